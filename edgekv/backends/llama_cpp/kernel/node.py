"""One attention node of ggml, given NumPy arrays and computed by a backend: for checks and tests."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from edgekv.backends.llama_cpp.kernel.ggml import InitParams, ggml
from edgekv.errors import BackendError
from edgekv.source import Array

ARENA_NBYTES = 256 * 2**20
EIGHT_BITS, BFLOAT16 = 1, 2  # bits of `rounding`


def load_backend(path: Path, n_threads: int) -> Any:
    """A ggml backend from a plug-in's file.

    Raises:
        BackendError: ggml refused it.
    """
    reg = ggml("ggml_backend_load")(str(path).encode())
    if not reg:
        raise BackendError(f"ggml does not load {path}; it was built for another ggml or another CPU")
    backend = ggml("ggml_backend_dev_init")(ggml("ggml_backend_reg_dev_get")(reg, 0), None)
    address = ggml("ggml_backend_reg_get_proc_address")(reg, b"ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)(backend, n_threads)
    return backend


@dataclass(frozen=True)
class Node:
    """An attention node's inputs.

    q (n, H, T, K); k (n, G, S, K) and v (n, G, S, V), stored as `type_k` and `type_v`; without v the values are the
    first `width_v` of each row of k. mask (n or 1, H or 1, T, S) is added to the scores, sinks (H) join the softmax.
    """

    q: Array
    k: Array
    v: Array | None
    type_k: GGMLType
    type_v: GGMLType
    width_v: int
    mask: Array | None = None
    sinks: Array | None = None
    scale: float = 1.0
    softcap: float = 0.0


def attend(backend: Any, node: Node) -> Array:
    """The node's output (n, T, H, V).

    Raises:
        BackendError: the backend does not compute such a node, or failed.
    """
    context = ggml("ggml_init")(InitParams(ARENA_NBYTES, None, False))
    try:
        out = _node(context, node)
        if not ggml("ggml_backend_supports_op")(backend, out):
            raise BackendError("the backend does not compute this node")
        graph = ggml("ggml_new_graph")(context)
        ggml("ggml_build_forward_expand")(graph, out)
        if ggml("ggml_backend_graph_compute")(backend, graph):
            raise BackendError("ggml failed to compute the node")
        n, heads, tokens, _ = node.q.shape
        shape = (n, tokens, heads, node.width_v)
        floats = (c_float * int(np.prod(shape))).from_address(ggml("ggml_get_data")(out))
        return np.ctypeslib.as_array(floats).reshape(shape).copy()
    finally:
        ggml("ggml_free")(context)


def _node(context: Any, node: Node) -> Any:
    k, row = _tensor(context, node.k, node.type_k)
    if node.v is None:
        n, groups, rows, _ = node.k.shape
        strides = (row, row * rows, row * rows * groups)
        v = ggml("ggml_view_4d")(context, k, node.width_v, rows, groups, n, *strides, 0)
    else:
        v, _ = _tensor(context, node.v, node.type_v)
    q, _ = _tensor(context, node.q, GGMLType.F32)
    mask = None if node.mask is None else _tensor(context, node.mask, GGMLType.F16)[0]
    out = ggml("ggml_flash_attn_ext")(context, q, k, v, mask, node.scale, 0.0, node.softcap)
    if node.sinks is not None:
        sinks, _ = _tensor(context, node.sinks.reshape(1, 1, 1, -1), GGMLType.F32)
        ggml("ggml_flash_attn_ext_add_sinks")(out, sinks)
    return out


def _tensor(context: Any, array: Array, kind: GGMLType) -> tuple[Any, int]:
    """A tensor of an array's values, and the bytes of one row."""
    stored = np.ascontiguousarray(stored_as(array, kind))
    tensor = ggml("ggml_new_tensor_4d")(context, kind, *array.shape[::-1])
    ctypes.memmove(ggml("ggml_get_data")(tensor), stored.ctypes.data, stored.nbytes)
    return tensor, stored.nbytes // int(np.prod(array.shape[:-1]))


def stored_as(array: Array, kind: GGMLType) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of an array in a ggml type, by ggml."""
    *rows, width = array.shape
    values = np.ascontiguousarray(array, np.float32)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    stored = np.empty((*rows, width // block * nbytes), np.uint8)
    ggml("ggml_quantize_chunk")(
        kind, values.ctypes.data, stored.ctypes.data, 0, int(np.prod(rows)), width, None
    )
    return stored


def as_stored(array: Array, kind: GGMLType) -> Array:
    """An array as it is read back from a ggml type."""
    return np.asarray(gguf.quants.dequantize(stored_as(array, kind), kind), np.float32).reshape(array.shape)


def rounding(path: Path, node: Node) -> int:
    """How a plug-in rounds a node's numbers, the bits of a sum: 1: queries to 8 bits; 2: to bfloat16."""
    function = ctypes.CDLL(str(path)).edgekv_rounding
    return int(function(int(node.type_k))) | int(function(int(node.type_v))) & BFLOAT16


def rounded(q: Array) -> Array:
    """Queries (..., K) rounded as ggml/src/ggml-quants.c rounds to q8_0, but for the scale, which stays float32."""
    blocks = q.reshape(*q.shape[:-1], -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / np.where(most > 0, most, 1)))
    return np.asarray(codes * (most / np.float32(127)), np.float32).reshape(q.shape)


def twin(node: Node) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The node's output (n, T, H, V) in NumPy's float64, of the rows as they are stored."""
    group = node.q.shape[1] // node.k.shape[1]
    k = as_stored(node.k, node.type_k)
    v = k[..., : node.width_v] if node.v is None else as_stored(node.v, node.type_v)
    values = np.repeat(v.astype(np.float64), group, axis=1)
    return np.asarray((softmax_twin(node) @ values).swapaxes(1, 2))


def softmax_twin(node: Node) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The node's softmax weights (n, H, T, S) in NumPy's float64, of the keys as they are stored."""
    group = node.q.shape[1] // node.k.shape[1]
    keys = np.repeat(as_stored(node.k, node.type_k).astype(np.float64), group, axis=1)
    scores = node.q.astype(np.float64) @ keys.swapaxes(-1, -2) * node.scale
    if node.softcap:
        scores = node.softcap * np.tanh(scores / node.softcap)
    if node.mask is not None:
        scores = scores + node.mask
    if node.sinks is not None:
        sinks = np.broadcast_to(node.sinks[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray(weights[..., : keys.shape[2]])
