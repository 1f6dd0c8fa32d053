"""Canonical tensors of an MLA model whose file holds keys' and values' up-projections as one matrix."""

from __future__ import annotations

import numpy as np

from edgekv.gguf_spec import ROPE_FACTORS
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import MLA


def split_joint_kv(source: TensorSource) -> TensorSource:
    """`attn_kv_b` (H * (N + V), R), each head's keys first, as `attn_k_b` (H, R, N) and `attn_v_b` (H, V, R).

    LongRoPE factors leave the tensors: the spec carries them.
    """
    split = LazySource(source.spec, source.metadata)
    for name in source.names():
        if name.endswith(".attn_kv_b.weight"):
            _add_halves(split, source, name)
        elif name not in ROPE_FACTORS:
            split.borrow(source, name)
    return split


def _add_halves(split: LazySource, source: TensorSource, name: str) -> None:
    prefix = name.removesuffix("attn_kv_b.weight")
    attention = source.spec.layers[int(prefix.split(".")[1])].attention
    assert isinstance(attention, MLA)
    h, r, n, v = attention.n_heads, attention.kv_lora_rank, attention.nope_dim, attention.value_dim

    def joint() -> Array:
        return source.load(name).reshape(h, n + v, r)

    split.add(
        f"{prefix}attn_k_b.weight",
        (h, r, n),
        lambda: np.ascontiguousarray(joint()[:, :n].swapaxes(1, 2)),
    )
    split.add(f"{prefix}attn_v_b.weight", (h, v, r), lambda: np.ascontiguousarray(joint()[:, n:]))
