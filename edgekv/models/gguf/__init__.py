"""GGUF files in: header, architectures, canonical tensors."""
