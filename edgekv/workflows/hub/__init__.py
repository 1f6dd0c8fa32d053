"""Workflows of the Hugging Face Hub."""
