"""llama.cpp's own GGUF reader, the oracle of these tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from edgekv.backends.llama_cpp.library import take_log


class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@pytest.fixture(scope="session")
def llama_accepts() -> Callable[[Path], bool]:
    """Whether llama.cpp's reader (gguf_init_from_file) accepts a file."""
    lib: Any = llama_cpp.llama_cpp._lib
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    take_log()  # it is kept, not printed

    def accepts(path: Path) -> bool:
        context = lib.gguf_init_from_file(str(path).encode(), InitParams(True, None))
        if context:
            lib.gguf_free(context)
        return bool(context)

    return accepts
