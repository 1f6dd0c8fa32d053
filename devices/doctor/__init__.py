"""Doctor: checks whether this machine is ready."""
