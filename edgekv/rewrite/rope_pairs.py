"""RoPE pairs: as complex numbers, and from halves (dims j and j + K/2) to neighbours (dims 2j and 2j + 1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgekv.rewrite.linalg import Matrix
from edgekv.source import Array, TensorSource, with_tensors
from edgekv.spec import GQA
from edgekv.tensors import with_neighbouring_pairs

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
    reordered, computed = [], {}
    names = frozenset(source.names())
    for i, layer in enumerate(layers):
        assert isinstance(layer.attention, GQA)
        rope = replace(layer.attention.rope, layout="interleaved")
        reordered.append(replace(layer, attention=replace(layer.attention, rope=rope)))
        for tensor in ("q.weight", "k.weight", "q.bias", "k.bias"):
            if (name := f"blk.{i}.attn_{tensor}") in names:
                computed[name] = partial(_neighbouring, source, name, layer.attention.head_dim)
    return with_tensors(source, computed, replace(source.spec, layers=tuple(reordered)))


def _neighbouring(source: TensorSource, name: str, head_dim: int) -> Array:
    rows = source.load(name)
    return with_neighbouring_pairs(rows, len(rows) // head_dim, head_dim)
