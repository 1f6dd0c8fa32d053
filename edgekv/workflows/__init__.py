"""Workflows: what the command line, a server and Python call. A frozen request in, progress out, a result back."""
