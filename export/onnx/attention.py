"""Grouped-query attention as ONNX nodes, and what it shares with the latent kind (edgekv.export.onnx.latent).

The batch is one sequence. Shapes in comments use the letters of edgekv/spec.py; W = R + P is a cached row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.weights import Bits, linear
from edgekv.models.onnx.manifest import ring_window
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import inverse_frequencies, rope_tables
from edgekv.spec import GQA, RopeSpec

TABLE_ROWS = 1024  # of a table of turns at once: they are computed in complex128
LAST = 2**31  # behind every position
CACHE_LENGTH = "cache_length"  # the dimension of slots in cache tensors that keep every token


class AttentionNodes(Protocol):
    """Adds one layer's attention to a graph; what all layers share is added once, when it is made."""

    def add(self, x: Value, w: BlockWeights, layer: int, bits: Bits) -> Value:
        """Nodes from normed hidden states (1, T, D) to what the attention adds to them, (1, T, D)."""


class GroupedInputs:
    """What layers of GQA share: how many tokens there are, and what turns them, for each kind of RoPE."""

    def __init__(self, g: GraphWriter, position_ids: Value, slots: Value, context_length: int) -> None:
        self._g, self.position_ids, self.context_length = g, position_ids, context_length
        last = g.op("Slice", slots, g.ints(-1), g.ints(LAST), g.ints(0))
        self.last_slot = g.cast(last, np.int32)  # (1,)
        length = g.op("Add", g.op("Squeeze", last, g.ints(0)), g.constant(np.array(1, np.int64)))
        self.length = g.cast(length, np.int32)  # ()
        self._tables: dict[RopeSpec, tuple[Value, Value]] = {}
        self._turns: dict[RopeSpec, tuple[Value, Value]] = {}

    def turns(self, rope: RopeSpec) -> tuple[Value, Value]:
        """cos and sin of the new tokens, (1, T, P/2)."""
        if rope not in self._turns:
            self._turns[rope] = rotation(self._g, self.position_ids, rope)
        return self._turns[rope]

    def tables(self, rope: RopeSpec) -> tuple[Value, Value]:
        """cos and sin of every position, (context_length, P/2)."""
        if rope not in self._tables:
            name = f"rope{len(self._tables) or ''}"
            starts = range(0, self.context_length, TABLE_ROWS)
            parts = [
                rope_tables(np.arange(i, min(i + TABLE_ROWS, self.context_length)), rope) for i in starts
            ]
            cos, sin = (np.concatenate(halves) for halves in zip(*parts, strict=True))
            self._tables[rope] = self._g.weight(f"{name}.cos", cos), self._g.weight(f"{name}.sin", sin)
        return self._tables[rope]


class GroupedAttention:
    """GQA by onnxruntime's GroupQueryAttention, which writes new keys and values into the cache it is given.

    One node rotates, stores and attends; heads with norms come to it normed and rotated. It takes cache_length
    slots, of which those of the positions so far are in use, as onnxruntime-genai has it. A layer with a window lets
    go of what is behind it: its cache has a length of its own, at least the window, in which the node keeps the last
    rows in order. `eps` is QK-norm's.
    """

    def __init__(self, g: GraphWriter, spec: GQA, eps: float, inputs: GroupedInputs) -> None:
        self._g, self._spec, self._eps, self._inputs = g, spec, eps, inputs
        self._rotation: tuple[Value, ...] = ()
        if spec.rope.dim and not spec.qk_norm:
            self._rotation = (*inputs.tables(spec.rope), inputs.position_ids)

    def add(self, x: Value, w: BlockWeights, layer: int, bits: Bits) -> Value:
        g, spec = self._g, self._spec
        joint = np.concatenate([w[f"attn_{kind}.weight"] for kind in "qkv"])
        qkv = linear(g, x, f"layers.{layer}.attn.qkv", joint, bits)
        if spec.bias:
            bias = np.concatenate([w[f"attn_{kind}.bias"] for kind in "qkv"])
            qkv = g.op("Add", qkv, g.weight(f"layers.{layer}.attn.qkv_bias", bias))
        window = ring_window(spec, self._inputs.context_length)
        slots = f"slots_of_window_{window}" if window else CACHE_LENGTH
        shape = (1, spec.n_kv_heads, slots, spec.head_dim)
        past = [g.input(f"past_key_values.{layer}.{kind}", np.float32, shape) for kind in ("key", "value")]
        heads = self._normed(qkv, w, layer) if spec.qk_norm else (qkv, None, None)
        mixed, *present = g.ops(
            "GroupQueryAttention",
            *(*heads, *past, self._inputs.last_slot, self._inputs.length),
            *self._rotation,
            n_outputs=3,
            num_heads=spec.n_heads,
            kv_num_heads=spec.n_kv_heads,
            scale=spec.score_scale,
            softcap=spec.softcap,
            local_window_size=window or -1,
            do_rotary=int(bool(self._rotation)),
            rotary_interleaved=int(spec.rope.layout == "interleaved"),
            **({"sliding_window_cache": 1} if window else {}),
        )
        for kind, cache in zip(("key", "value"), present, strict=True):
            g.output(cache, f"present.{layer}.{kind}", np.float32, shape)
        return linear(g, mixed, f"layers.{layer}.attn.output", w["attn_output.weight"], bits)

    def _normed(self, qkv: Value, w: BlockWeights, layer: int) -> Sequence[Value]:
        """Queries, keys and values of joint ones (1, T, (H + 2 * G) * K), the first two normed by head and rotated.

        The node has inputs for the norms' weights, which onnxruntime 1.32 knows on GPUs only. Rotating here as well
        costs a small node and saves the table: 67 MB for Gemma-3-270m.
        """
        g, spec = self._g, self._spec
        kv_width = spec.n_kv_heads * spec.head_dim
        widths = g.ints(spec.n_heads * spec.head_dim, kv_width, kv_width)
        *queries_and_keys, values = g.ops("Split", qkv, widths, n_outputs=3, axis=-1)
        normed = []
        for kind, n_heads, x in zip("qk", (spec.n_heads, spec.n_kv_heads), queries_and_keys, strict=True):
            weight = g.weight(f"layers.{layer}.attn.{kind}_norm", w[f"attn_{kind}_norm.weight"])
            by_head = g.op("Reshape", x, g.ints(1, -1, n_heads, spec.head_dim))
            by_head = g.op("RMSNormalization", by_head, weight, epsilon=self._eps)
            flat = g.op("Reshape", by_head, g.ints(1, -1, n_heads * spec.head_dim))
            if spec.rope.dim:
                flat = rotate(g, flat, self._inputs.turns(spec.rope), n_heads, spec.rope)
            normed.append(flat)
        return (*normed, values)


def rotation(g: GraphWriter, position_ids: Value, rope: RopeSpec) -> tuple[Value, Value]:
    """cos and sin (1, T, P/2) of every position, computed in float64: a table would bound the context."""
    positions = g.cast(g.op("Unsqueeze", position_ids, g.ints(2)), np.float64)  # (1, T, 1)
    angles = g.op("Mul", positions, g.constant(inverse_frequencies(rope)[None, None, :]))
    cos, sin = (g.cast(g.op(kind, angles), np.float32) for kind in ("Cos", "Sin"))
    if rope.magnitude != 1.0:
        cos, sin = (g.op("Mul", table, g.scalar(rope.magnitude)) for table in (cos, sin))
    return cos, sin


def rotate(g: GraphWriter, x: Value, tables: tuple[Value, Value], n_heads: int, rope: RopeSpec) -> Value:
    """RoPE on the first P dims of each head of x (1, T, heads * K)."""
    interleaved = int(rope.layout == "interleaved")
    return g.op(
        "RotaryEmbedding",
        x,
        *tables,
        num_heads=n_heads,
        interleaved=interleaved,
        rotary_embedding_dim=rope.dim,
    )


def skip_norm(g: GraphWriter, x: Value, delta: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """(RMSNorm(x + delta), x + delta) in one pass: onnxruntime's SkipSimplifiedLayerNormalization."""
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization", x, delta, weight, n_outputs=4, epsilon=eps
    )
    return normed, total
