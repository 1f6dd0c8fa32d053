"""Engines in child processes: a native crash becomes an error message here."""
