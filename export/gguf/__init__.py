"""Writer and quantizer of GGUF files."""
