"""Servers of one model that answer for each other, or give each other rows of what they have cached."""
