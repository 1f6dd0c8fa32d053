"""Grouped-query attention as ONNX nodes, and what it shares with the latent kind (edgekv.export.onnx.latent).

The batch is one sequence. Shapes in comments use the letters of edgekv/spec.py; W = R + P is a cached row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.weights import Bits, linear
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import inverse_frequencies, rope_tables
from edgekv.spec import GQA, RopeSpec

CACHE_LENGTH = "cache_length"  # the dimension of slots in every cache tensor


class AttentionNodes(Protocol):
    """Adds one layer's attention to a graph; what all layers share is added once, when it is made."""

    def add(self, x: Value, w: BlockWeights, layer: int, bits: Bits) -> Value:
        """Nodes from normed hidden states (1, T, D) to what the attention adds to them, (1, T, D)."""


class GroupedAttention:
    """GQA by onnxruntime's GroupQueryAttention, which writes new keys and values into the cache it is given.

    One node rotates, stores and attends. It takes cache_length slots of which attention_mask counts those
    in use, the new tokens included, as onnxruntime-genai has it.
    """

    def __init__(
        self, g: GraphWriter, spec: GQA, mask: Value, position_ids: Value, context_length: int
    ) -> None:
        self._g, self._spec, self._position_ids = g, spec, position_ids
        used = g.op("ReduceSum", mask, g.ints(1), keepdims=0)
        self._last_slot = g.cast(g.op("Sub", used, g.ints(1)), np.int32)  # (1,)
        length = g.op("Gather", g.op("Shape", mask), g.constant(np.array(1, np.int64)), axis=0)
        self._length = g.cast(length, np.int32)  # ()
        cos, sin = rope_tables(np.arange(context_length), spec.rope)
        self._cos, self._sin = g.weight("rope.cos", cos), g.weight("rope.sin", sin)

    def add(self, x: Value, w: BlockWeights, layer: int, bits: Bits) -> Value:
        g, spec = self._g, self._spec
        joint = np.concatenate([w[f"attn_{kind}.weight"] for kind in "qkv"])
        qkv = linear(g, x, f"layers.{layer}.attn.qkv", joint, bits)
        if spec.bias:
            bias = np.concatenate([w[f"attn_{kind}.bias"] for kind in "qkv"])
            qkv = g.op("Add", qkv, g.weight(f"layers.{layer}.attn.qkv_bias", bias))
        shape = (1, spec.n_kv_heads, CACHE_LENGTH, spec.head_dim)
        past = [g.input(f"past_key_values.{layer}.{kind}", np.float32, shape) for kind in ("key", "value")]
        mixed, *present = g.ops(
            "GroupQueryAttention",
            *(qkv, None, None, *past, self._last_slot, self._length),
            *(self._cos, self._sin, self._position_ids),
            n_outputs=3,
            num_heads=spec.n_heads,
            kv_num_heads=spec.n_kv_heads,
            scale=spec.score_scale,
            softcap=spec.softcap,
            local_window_size=spec.window or -1,
            do_rotary=1,
            rotary_interleaved=int(spec.rope.layout == "interleaved"),
        )
        for kind, cache in zip(("key", "value"), present, strict=True):
            g.output(cache, f"present.{layer}.{kind}", np.float32, shape)
        return linear(g, mixed, f"layers.{layer}.attn.output", w["attn_output.weight"], bits)


def rotation(g: GraphWriter, position_ids: Value, rope: RopeSpec) -> tuple[Value, Value]:
    """cos and sin (1, T, P/2) of every position, computed in float64: a table would bound the context."""
    positions = g.cast(g.op("Unsqueeze", position_ids, g.ints(2)), np.float64)  # (1, T, 1)
    angles = g.op("Mul", positions, g.constant(inverse_frequencies(rope)[None, None, :]))
    cos, sin = (g.cast(g.op(kind, angles), np.float32) for kind in ("Cos", "Sin"))
    if rope.magnitude != 1.0:
        cos, sin = (g.op("Mul", table, g.scalar(rope.magnitude)) for table in (cos, sin))
    return cos, sin


def rotate(g: GraphWriter, x: Value, tables: tuple[Value, Value], n_heads: int, rope: RopeSpec) -> Value:
    """RoPE on all dims of x (1, T, heads * P)."""
    interleaved = int(rope.layout == "interleaved")
    return g.op("RotaryEmbedding", x, *tables, num_heads=n_heads, interleaved=interleaved)


def skip_norm(g: GraphWriter, x: Value, delta: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """(RMSNorm(x + delta), x + delta) in one pass: onnxruntime's SkipSimplifiedLayerNormalization."""
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization", x, delta, weight, n_outputs=4, epsilon=eps
    )
    return normed, total
