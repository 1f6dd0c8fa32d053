"""Writer of ONNX folders: the decoder graph, its weights, companion files."""
