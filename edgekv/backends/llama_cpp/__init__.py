"""llama.cpp through llama-cpp-python: inference, importance matrices, quantization, memory needs."""
