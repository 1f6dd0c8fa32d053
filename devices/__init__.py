"""Machines: what they are, what they did, what they would do."""
