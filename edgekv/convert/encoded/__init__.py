"""Conversion to a latent that is encoded from keys and values when they are written: every GQA family."""
