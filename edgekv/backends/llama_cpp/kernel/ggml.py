"""ggml's C functions, by ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from edgekv.backends.llama_cpp.library import llama


class InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml/include/ggml.h)."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # ggml/include/{ggml,ggml-backend}.h
    "ggml_version": (c_char_p, []),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, *[c_int64] * 4]),
    "ggml_view_4d": (c_void_p, [c_void_p, c_void_p, *[c_int64] * 4, *[c_size_t] * 4]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, *[c_int64] * 3, c_void_p]),
    "ggml_flash_attn_ext": (c_void_p, [*[c_void_p] * 5, *[c_float] * 3]),
    "ggml_flash_attn_ext_add_sinks": (None, [c_void_p] * 2),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_supports_op": (c_bool, [c_void_p] * 2),
    "ggml_backend_load": (c_void_p, [c_char_p]),
    "ggml_backend_unload": (None, [c_void_p]),
    "ggml_backend_reg_by_name": (c_void_p, [c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
}


def ggml(name: str) -> Any:
    """A function of the ggml that llama.cpp loaded: the package holds other copies, each with a registry of its own."""
    function = getattr(llama()._lib, name)
    function.restype, function.argtypes = _SIGNATURES[name]
    return function
