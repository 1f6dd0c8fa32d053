"""Sensors of this machine: cores, memory, temperature, energy, GPU."""
