"""Workflows, which the command line, a server and Python call: a frozen request in, progress out, a result back."""
