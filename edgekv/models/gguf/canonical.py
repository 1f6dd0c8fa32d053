"""Canonical tensors of models whose GGUF holds as one tensor what is several elsewhere."""

from __future__ import annotations

import re
from functools import partial

from edgekv.models.gguf.spec import JOINT_KV_B, ROPE_FACTORS, ROPE_FREQS
from edgekv.source import Array, LazySource, TensorSource, without
from edgekv.spec import MLA
from edgekv.tensors import keys_of_kv_b, model_tensor_shapes, values_of_kv_b

_BLOCK = re.compile(r"(blk\.(\d+)\.)(.*)")


def canonical(source: TensorSource) -> TensorSource:
    """The source itself, or its fused tensors in parts; rope factors leave the tensors, the spec has them."""
    if source.spec.arch in JOINT_KV_B:
        return split_joint_kv(source)
    if source.spec.arch == "phi3":
        return split_phi3(source)
    return without(source, ROPE_FREQS) if ROPE_FREQS in source.names() else source


def split_joint_kv(source: TensorSource) -> TensorSource:
    """`attn_kv_b` (H * (N + V), R), each head's keys first, as `attn_k_b` (H, R, N) and `attn_v_b` (H, V, R)."""
    split = LazySource(source.spec, source.metadata)
    for name in source.names():
        if name.endswith(".attn_kv_b.weight"):
            _add_halves(split, source, name)
        elif name not in ROPE_FACTORS:
            split.borrow(source, name)
    return split


def split_phi3(source: TensorSource) -> TensorSource:
    """`attn_qkv` as queries, keys and values; `ffn_up` as the gate and what it gates, in this order."""
    shapes = model_tensor_shapes(source.spec)
    split = LazySource(source.spec, source.metadata)
    for name in source.names():
        match = _BLOCK.fullmatch(name)
        prefix, tensor = (match[1], match[3]) if match else ("", name)
        if tensor == "attn_qkv.weight":
            _add_rows(split, source, name, [f"{prefix}attn_{kind}.weight" for kind in "qkv"], shapes)
        elif tensor == "ffn_up.weight":
            _add_rows(split, source, name, [f"{prefix}ffn_{kind}.weight" for kind in ("gate", "up")], shapes)
        elif name not in ROPE_FACTORS:
            split.borrow(source, name)
    return split


def _add_rows(
    split: LazySource,
    source: TensorSource,
    fused: str,
    parts: list[str],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    start = 0
    for part in parts:
        stop = start + shapes[part][0]
        split.add(part, shapes[part], partial(_rows, source, fused, start, stop))
        start = stop


def _rows(source: TensorSource, name: str, start: int, stop: int) -> Array:
    return source.load(name)[start:stop]


def _add_halves(split: LazySource, source: TensorSource, name: str) -> None:
    prefix = name.removesuffix("attn_kv_b.weight")
    attention = source.spec.layers[int(prefix.split(".")[1])].attention
    assert isinstance(attention, MLA)
    h, r, n, v = attention.n_heads, attention.kv_lora_rank, attention.nope_dim, attention.value_dim
    split.add(f"{prefix}attn_k_b.weight", (h, r, n), lambda: keys_of_kv_b(source.load(name), attention))
    split.add(f"{prefix}attn_v_b.weight", (h, v, r), lambda: values_of_kv_b(source.load(name), attention))
