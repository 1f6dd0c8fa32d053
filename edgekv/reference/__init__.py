"""NumPy reference model: the oracle that every engine is compared with."""
