"""ONNX folders in: manifest and external data."""
