"""ONNX folders out: the decoder graph, its weights, companion files."""
