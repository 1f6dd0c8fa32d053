"""Checks whether this machine is ready."""
