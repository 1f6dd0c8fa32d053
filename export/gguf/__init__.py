"""GGUF files out: writing and quantizing."""
