"""Writers: GGUF, ONNX, safetensors; and their check."""
