"""Rewrites of a model's weights that leave its function unchanged; tests/rewrite/test_same_function.py runs each."""
