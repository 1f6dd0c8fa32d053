"""Devices: sensors, benchmarks, board profiles, predictions, reports and the doctor."""
