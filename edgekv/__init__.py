"""EdgeKV: language models with a small KV cache for small machines."""

__version__ = "0.1.0"
