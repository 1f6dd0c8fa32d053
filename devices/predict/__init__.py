"""Predictions of memory and speed on a board."""
