"""Benchmarks of prefill and decode speed and memory."""
