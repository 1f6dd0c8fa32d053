"""The attention kernel: a ggml plug-in in C++ that reads each cached row once for all heads and tokens of a batch.

Stock llama.cpp walks the cache once per query head, and dequantizes a quantized row anew each time. attention.cpp is
the arithmetic, backend.cpp presents it to ggml as an accelerator device that takes FLASH_ATTN_EXT and nothing else.
build.py compiles both for this machine, check.py compares the outcome with NumPy, load.py puts it into llama.cpp.
"""
