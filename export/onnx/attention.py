"""Grouped-query attention as ONNX nodes, and what it shares with the latent kind (onnx_latent).

The batch is one sequence. Shapes in comments use the letters of edgekv/spec.py; W = R + P is a cached row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edgekv.export.onnx.graph import DOUBLE, FLOAT, INT32, MICROSOFT, GraphWriter
from edgekv.export.onnx.weights import Bits, linear
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import inverse_frequencies, rope_tables
from edgekv.spec import GQA, RopeSpec

CACHE_LENGTH = "cache_length"  # the dimension of slots in every cache tensor


class AttentionNodes(Protocol):
    """Adds one layer's attention to a graph; what all layers share is added once, when it is made."""

    def add(self, x: str, w: BlockWeights, layer: int, bits: Bits) -> str:
        """Nodes from normed hidden states (1, T, D) to what the attention adds to them, (1, T, D)."""


class GroupedAttention:
    """GQA by onnxruntime's GroupQueryAttention, which writes new keys and values into the cache it is given.

    One node rotates, stores and attends. It takes cache_length slots of which attention_mask counts those
    in use, the new tokens included, as onnxruntime-genai has it.
    """

    def __init__(self, g: GraphWriter, spec: GQA, mask: str, position_ids: str, context_length: int) -> None:
        self._g, self._spec, self._position_ids = g, spec, position_ids
        used = g.op("ReduceSum", mask, g.ints(1), keepdims=0)
        self._last_slot = g.op("Cast", g.op("Sub", used, g.ints(1)), to=INT32)  # (1,)
        length = g.op("Gather", g.op("Shape", mask), g.constant(np.array(1, np.int64)), axis=0)
        self._length = g.op("Cast", length, to=INT32)  # ()
        cos, sin = rope_tables(np.arange(context_length), spec.rope)
        self._cos, self._sin = g.weight("rope.cos", cos), g.weight("rope.sin", sin)

    def add(self, x: str, w: BlockWeights, layer: int, bits: Bits) -> str:
        g, spec = self._g, self._spec
        joint = np.concatenate([w[f"attn_{kind}.weight"] for kind in "qkv"])
        qkv = linear(g, x, f"layers.{layer}.attn.qkv", joint, bits)
        if spec.bias:
            bias = np.concatenate([w[f"attn_{kind}.bias"] for kind in "qkv"])
            qkv = g.op("Add", qkv, g.weight(f"layers.{layer}.attn.qkv_bias", bias))
        shape = (1, spec.n_kv_heads, CACHE_LENGTH, spec.head_dim)
        caches = [(f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}") for kind in ("key", "value")]
        for past, present in caches:
            g.input(past, np.float32, shape)
            g.output(present, np.float32, shape)
        mixed = f"layers.{layer}.attn.mixed"
        g.named(
            "GroupQueryAttention",
            [
                *(qkv, "", "", *(past for past, _ in caches), self._last_slot, self._length),
                *(self._cos, self._sin, self._position_ids),
            ],
            [mixed, *(present for _, present in caches)],
            num_heads=spec.n_heads,
            kv_num_heads=spec.n_kv_heads,
            scale=spec.score_scale,
            softcap=spec.softcap,
            local_window_size=spec.window or -1,
            do_rotary=1,
            rotary_interleaved=int(spec.rope.layout == "interleaved"),
        )
        return linear(g, mixed, f"layers.{layer}.attn.output", w["attn_output.weight"], bits)


def rotation(g: GraphWriter, position_ids: str, rope: RopeSpec) -> tuple[str, str]:
    """cos and sin (1, T, P/2) of every position, computed in float64: a table would bound the context."""
    positions = g.op("Cast", g.op("Unsqueeze", position_ids, g.ints(2)), to=DOUBLE)  # (1, T, 1)
    angles = g.op("Mul", positions, g.constant(inverse_frequencies(rope)[None, None, :]))
    cos, sin = (g.op("Cast", g.op(kind, angles), to=FLOAT) for kind in ("Cos", "Sin"))
    if rope.magnitude != 1.0:
        cos, sin = (g.op("Mul", table, g.scalar(rope.magnitude)) for table in (cos, sin))
    return cos, sin


def rotate(g: GraphWriter, x: str, tables: tuple[str, str], n_heads: int, rope: RopeSpec) -> str:
    """RoPE on all dims of x (1, T, heads * P)."""
    interleaved = int(rope.layout == "interleaved")
    return g.op("RotaryEmbedding", x, *tables, num_heads=n_heads, interleaved=interleaved)


def skip_norm(g: GraphWriter, x: str, delta: str, weight: str, eps: float) -> tuple[str, str]:
    """(RMSNorm(x + delta), x + delta) in one pass: onnxruntime's SkipSimplifiedLayerNormalization."""
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization", x, delta, weight, n_outputs=4, domain=MICROSOFT, epsilon=eps
    )
    return normed, total
