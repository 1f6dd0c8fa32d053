"""RoPE pairs: as complex numbers, and from halves (dims j and j + K/2) to neighbours (dims 2j and 2j + 1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgekv.rewrite.linalg import Matrix
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import GQA

Complex = NDArray[np.complex128]


def to_complex(rows: Matrix) -> Complex:
    """Interleaved pairs (..., K, D) as complex rows (..., K/2, D)."""
    return np.asarray(rows[..., 0::2, :] + 1j * rows[..., 1::2, :])


def to_pairs(rows: Complex) -> Matrix:
    """Inverse of `to_complex`."""
    return np.stack([rows.real, rows.imag], axis=-2).reshape(*rows.shape[:-2], -1, rows.shape[-1])


def with_interleaved_pairs(source: TensorSource) -> TensorSource:
    """A GQA model whose RoPE pairs are dims (2j, 2j + 1): rows of queries and keys reordered, scores unchanged."""
    layers = source.spec.layers
    if not any(isinstance(a := layer.attention, GQA) and a.rope.layout == "half" for layer in layers):
        return source
    reordered = []
    for layer in layers:
        assert isinstance(layer.attention, GQA)
        rope = replace(layer.attention.rope, layout="interleaved")
        reordered.append(replace(layer, attention=replace(layer.attention, rope=rope)))
    out = LazySource(replace(source.spec, layers=tuple(reordered)), source.metadata)
    head_dims = [layer.attention.head_dim for layer in reordered]
    for name in source.names():
        block, _, tensor = name.partition(".attn_")
        if tensor.partition(".")[0] in ("q", "k"):
            head_dim = head_dims[int(block.removeprefix("blk."))]
            out.add(name, source.shape(name), partial(_interleaved, source, name, head_dim))
        else:
            out.borrow(source, name)
    return out


def _interleaved(source: TensorSource, name: str, head_dim: int) -> Array:
    """Rows j and j + K/2 of each head side by side, of a weight (H * K, D) or a bias (H * K,)."""
    rows = source.load(name)
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
