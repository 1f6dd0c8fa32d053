"""Writers of models: GGUF, ONNX, DeepseekV3 safetensors."""
