"""Queries and cached rows of a latent that is encoded when it is written (edgekv.spec.Encoder), as ONNX nodes."""

from __future__ import annotations

import numpy as np

from edgekv.export.onnx.attention import rotate
from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.weights import Bits, at_least_8, linear
from edgekv.reference.model import BlockWeights
from edgekv.rewrite.encoder_fold import fold_encoder
from edgekv.spec import MLA, Encoder

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

    Where nothing is normed between the hidden states and the row, one matrix makes it. The maps between heads and
    rows, which are small, stay in float32.
    """
    encoder = spec.encoder
    assert encoder is not None
    queries = linear(g, x, f"{name}.q", w["attn_q.weight"], bits)
    if encoder.bias:
        queries = g.op("Add", queries, g.weight(f"{name}.q_bias", w["attn_q.bias"]))
    heads = _heads(g, spec, eps, queries, w, name, "q", spec.n_heads)  # (1, T, H, K)
    if encoder.qk_norm:
        row = _write_normed(g, spec, eps, x, w, name, bits)
    else:
        row = _write_folded(g, encoder, x, w, name, bits)
    row = g.op("Unsqueeze", row, g.ints(0))  # (1, 1, T, W)
    scale = np.float32(spec.score_scale / (spec.softcap or 1.0))
    query_map = g.weight(f"{name}.q_map", w["attn_q_map.weight"].swapaxes(1, 2) * scale)  # (H, K, W)
    reading = g.op("MatMul", g.op("Transpose", heads, perm=[0, 2, 1, 3]), query_map)
    return (
        _rotate_behind(g, spec, reading, tables, spec.n_heads),
        _rotate_behind(g, spec, row, tables, 1),
    )


def _write_folded(
    g: GraphWriter, encoder: Encoder, x: Value, w: BlockWeights, name: str, bits: Bits
) -> Value:
    """What is cached, (1, T, W), by the encoder times what makes keys and values."""
    key_bias = w["attn_k.bias"] if encoder.bias else None
    written = w["attn_kv_enc.weight"], w["attn_kv_enc.bias"]
    weight, bias = fold_encoder(*written, w["attn_k.weight"], w["attn_v.weight"], key_bias)
    row = linear(g, x, f"{name}.kv", weight, at_least_8(bits))
    return g.op("Add", row, g.weight(f"{name}.kv_bias", bias))


def _write_normed(
    g: GraphWriter, spec: MLA, eps: float, x: Value, w: BlockWeights, name: str, bits: Bits
) -> Value:
    """What is cached, (1, T, W), of keys that pass a norm first."""
    encoder = spec.encoder
    assert encoder is not None
    kv_width = encoder.n_kv_heads * encoder.head_dim
    joint = np.concatenate([w["attn_k.weight"], w["attn_v.weight"]])
    keys, values = g.ops(
        "Split",
        linear(g, x, f"{name}.kv", joint, at_least_8(bits)),
        g.ints(kv_width, kv_width),
        n_outputs=2,
        axis=-1,
    )
    if encoder.bias:
        keys = g.op("Add", keys, g.weight(f"{name}.k_bias", w["attn_k.bias"]))
    keys = _heads(g, spec, eps, keys, w, name, "k", encoder.n_kv_heads)
    keys = g.op("Reshape", keys, g.ints(1, -1, kv_width))
    row = g.op(
        "MatMul",
        g.op("Concat", keys, values, axis=-1),
        g.weight(f"{name}.kv_enc", w["attn_kv_enc.weight"].T),
    )
    return g.op("Add", row, g.weight(f"{name}.kv_enc_bias", w["attn_kv_enc.bias"]))


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
