"""Queries and cached rows of a latent that is encoded when it is written (edgekv.spec.Encoder), as ONNX nodes."""

from __future__ import annotations

import numpy as np

from edgekv.export.onnx.attention import rotate
from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.weights import Bits, linear
from edgekv.reference.model import BlockWeights
from edgekv.spec import MLA

Tables = tuple[Value, Value]


def encoded_queries_and_row(
    g: GraphWriter,
    spec: MLA,
    eps: float,
    tables: Tables | None,
    x: Value,
    w: BlockWeights,
    name: str,
    bits: Bits,
) -> tuple[Value, Value]:
    """Absorbed queries (1, H, T, W), scaled, and what is cached, (1, 1, T, W), of normed hidden states (1, T, D).

    The maps between heads and rows stay in float32: they are small, and MatMulNBits would round what goes into them
    to 8 bits, where keys have biases (Qwen2.5) that are tens of times what varies.
    """
    encoder = spec.encoder
    assert encoder is not None
    kv_width = encoder.n_kv_heads * encoder.head_dim
    joint = np.concatenate([w[f"attn_{kind}.weight"] for kind in "qkv"])
    qkv = linear(g, x, f"{name}.qkv", joint, bits)
    if encoder.bias:
        bias = np.concatenate([w["attn_q.bias"], w["attn_k.bias"], np.zeros(kv_width, np.float32)])
        qkv = g.op("Add", qkv, g.weight(f"{name}.qkv_bias", bias))
    widths = g.ints(spec.n_heads * spec.head_dim, kv_width, kv_width)
    queries, keys, values = g.ops("Split", qkv, widths, n_outputs=3, axis=-1)
    heads = _heads(g, spec, eps, queries, w, name, "q", spec.n_heads)  # (1, T, H, K)
    if encoder.qk_norm:
        keys = _heads(g, spec, eps, keys, w, name, "k", encoder.n_kv_heads)
        keys = g.op("Reshape", keys, g.ints(1, -1, kv_width))
    made = g.op("Unsqueeze", g.op("Concat", keys, values, axis=-1), g.ints(0))  # (1, 1, T, 2 * G * K)
    row = g.op("MatMul", made, g.weight(f"{name}.kv_enc", w["attn_kv_enc.weight"].T))
    row = g.op("Add", row, g.weight(f"{name}.kv_enc_bias", w["attn_kv_enc.bias"]))
    scale = np.float32(spec.score_scale / (spec.softcap or 1.0))
    query_map = g.weight(f"{name}.q_map", w["attn_q_map.weight"].swapaxes(1, 2) * scale)  # (H, K, W)
    reading = g.op("MatMul", g.op("Transpose", heads, perm=[0, 2, 1, 3]), query_map)
    return (
        _rotate_behind(g, spec, reading, tables, spec.n_heads),
        _rotate_behind(g, spec, row, tables, 1),
    )


def _heads(
    g: GraphWriter, spec: MLA, eps: float, x: Value, w: BlockWeights, name: str, kind: str, n_heads: int
) -> Value:
    """Heads (1, T, n, K) of (1, T, n * K), normed if the model does so."""
    heads = g.op("Reshape", x, g.ints(1, -1, n_heads, spec.head_dim))
    if spec.encoder is None or not spec.encoder.qk_norm:
        return heads
    weight = g.weight(f"{name}.{kind}_norm", w[f"attn_{kind}_norm.weight"])
    return g.op("RMSNormalization", heads, weight, epsilon=eps)


def _rotate_behind(g: GraphWriter, spec: MLA, x: Value, tables: Tables | None, n_heads: int) -> Value:
    """x (1, heads, T, W) with RoPE on what follows the latent."""
    if tables is None:
        return x
    widths = g.ints(spec.kv_lora_rank, spec.rope.dim)
    latent, rope = g.ops("Split", x, widths, n_outputs=2, axis=-1)
    return g.op("Concat", latent, rotate(g, rope, tables, n_heads, spec.rope), axis=-1)
