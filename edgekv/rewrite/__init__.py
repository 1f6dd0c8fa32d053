"""Rewrites of a model's weights that leave its function unchanged."""
