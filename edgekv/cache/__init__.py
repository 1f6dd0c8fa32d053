"""KV cache stores."""
