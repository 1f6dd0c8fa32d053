"""Policies that say which cached rows stay: one small file each, NumPy only, none knows an engine."""
