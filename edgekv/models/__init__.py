"""Readers of model files: GGUF, Hugging Face folders, ONNX folders."""
