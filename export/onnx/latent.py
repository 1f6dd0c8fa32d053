"""Multi-head latent attention as ONNX nodes, absorbed: every head reads the cached latents themselves.

A layer caches one row of W = R + P values per token. `TensorScatter` writes new rows into the slots their
positions name, in place where the caller binds the past and the present to the same memory, and one matrix
product with all heads as rows reads each cached row once. Slots behind the last token are masked, so that
cache_length may be any number of slots from there on. A layer with a window writes into a ring of slots of its own.
"""

from __future__ import annotations

import numpy as np

from edgekv.export.onnx.attention import CACHE_LENGTH, rotate, rotation
from edgekv.export.onnx.encoded import encoded_queries_and_row
from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.weights import Bits, at_least_8, linear
from edgekv.models.onnx.manifest import ring_window
from edgekv.reference.model import BlockWeights
from edgekv.spec import MLA, RopeSpec

ALL = 2**31  # behind any end
TINY = 1e-30  # keeps the scale of an all-zero row from being zero


class LatentInputs:
    """What latent layers share, each part added to the graph when a layer first asks for it."""

    def __init__(
        self, g: GraphWriter, mask: Value, position_ids: Value, slots: Value, context_length: int
    ) -> None:
        self._g, self._mask = g, mask
        self.position_ids, self.context_length = position_ids, context_length
        self._positions = slots  # as far as the cache knows: the same, unless tokens were evicted
        self.write_index = g.op(
            "Slice", self._positions, g.ints(0), g.ints(1), g.ints(0)
        )  # (1,): first new slot
        self._masks: dict[int, Value] = {}
        self._tables: dict[RopeSpec, tuple[Value, Value]] = {}
        self._shapes: dict[tuple[int, int], Value] = {}

    def mask(self, window: int, past: Value) -> Value:
        """(T, S): 0 where a token may look in a cache (1, 1, S, W), -inf elsewhere.

        Where there is a window, the slots are a ring: slot s holds the last position that is s modulo S.
        """
        if window not in self._masks:
            g = self._g
            zero, one = g.constant(np.array(0, np.int64)), g.constant(np.array(1, np.int64))
            n_slots = g.op("Squeeze", g.op("Shape", past, start=2, end=3), g.ints(0))
            slots = g.op("Range", zero, n_slots, one)  # (S,)
            positions = g.op("Unsqueeze", self._positions, g.ints(1))  # (T, 1)
            if window:
                last = g.op("Slice", self._positions, g.ints(-1), g.ints(ALL), g.ints(0))  # (1,)
                slots = g.op("Sub", last, g.op("Mod", g.op("Sub", last, slots), n_slots))
                seen = g.op("Greater", slots, g.op("Sub", positions, g.ints(window)))
                seen = g.op("And", seen, g.op("GreaterOrEqual", slots, zero))
            else:
                seen = g.op("Greater", self._mask, zero)
            seen = g.op("And", seen, g.op("LessOrEqual", slots, positions))
            self._masks[window] = g.op("Where", seen, g.scalar(0.0), g.scalar(-np.inf))
        return self._masks[window]

    def tables(self, rope: RopeSpec) -> tuple[Value, Value]:
        """cos and sin of the new tokens."""
        if rope not in self._tables:
            self._tables[rope] = rotation(self._g, self.position_ids, rope)
        return self._tables[rope]

    def score_shape(self, n_heads: int, window: int) -> Value:
        """(H, T, S), once there is a mask for the window."""
        if (n_heads, window) not in self._shapes:
            g = self._g
            self._shapes[n_heads, window] = g.op(
                "Concat", g.ints(n_heads), g.op("Shape", self._masks[window]), axis=0
            )
        return self._shapes[n_heads, window]


class LatentAttention:
    """edgekv.export.onnx.attention.AttentionNodes for MLA with a float32 cache."""

    def __init__(self, g: GraphWriter, spec: MLA, eps: float, inputs: LatentInputs) -> None:
        self._g, self._spec, self._eps, self._inputs = g, spec, eps, inputs
        self._window = ring_window(spec, inputs.context_length)
        self._mask: Value | None = None  # (T, S), once a cache says how many slots there are

    def _look_at(self, past: Value) -> None:
        """Make what depends on the number of slots of a cache (1, 1, S, W)."""
        self._mask = self._inputs.mask(self._window, past)
        self._score_shape = self._inputs.score_shape(self._spec.n_heads, self._window)

    def add(self, x: Value, w: BlockWeights, layer: int, bits: Bits) -> Value:
        g, spec, name = self._g, self._spec, f"layers.{layer}.attn"
        tables = self._inputs.tables(spec.rope) if spec.rope.dim else None
        if spec.encoder:
            queries, row = encoded_queries_and_row(g, spec, self._eps, tables, x, w, name, bits)
        else:
            assert tables is not None
            queries = self._queries(x, w, tables, name, bits)  # (1, H, T, W)
            row = self._row(x, w, tables, name, bits)  # (1, 1, T, W)
        mixed = self._attend(queries, row, layer)  # (H, T, W)
        values = g.op("Slice", mixed, g.ints(0), g.ints(spec.kv_lora_rank), g.ints(-1))  # (H, T, R)
        v_b, w_o = w["attn_v_b.weight"], w["attn_output.weight"]  # (H, V, R), (D, H * V)
        if spec.kv_lora_rank <= spec.value_dim:  # their product is no larger than w_o: v_b costs nothing then
            by_head = w_o.reshape(-1, spec.n_heads, spec.value_dim).swapaxes(0, 1)  # (H, D, V)
            w_o = (by_head @ v_b).swapaxes(0, 1).reshape(len(w_o), -1)  # (D, H * R)
        else:
            values = g.op("MatMul", values, g.weight(f"{name}.v_b", v_b.swapaxes(1, 2)))  # (H, T, V)
        merged = g.op("Reshape", g.op("Transpose", values, perm=[1, 0, 2]), g.ints(1, -1, w_o.shape[1]))
        out = linear(g, merged, f"{name}.output", w_o, bits)
        if spec.encoder:
            out = g.op("Add", out, g.weight(f"{name}.output_bias", w["attn_output.bias"]))
        return out

    def _queries(
        self, x: Value, w: BlockWeights, tables: tuple[Value, Value], name: str, bits: Bits
    ) -> Value:
        """Absorbed queries (1, H, T, W), scaled."""
        g, spec = self._g, self._spec
        if "attn_q.weight" in w:
            last = w["attn_q.weight"]
        else:
            x = linear(g, x, f"{name}.q_a", w["attn_q_a.weight"], bits)
            norm = g.weight(f"{name}.q_a_norm", w["attn_q_a_norm.weight"])
            x = g.op("RMSNormalization", x, norm, epsilon=self._eps)
            last = w["attn_q_b.weight"]
        q = linear(
            g, x, f"{name}.q", last * np.float32(spec.score_scale / (spec.softcap or 1.0)), bits
        )  # (1, T, H * (N + P))
        by_head = g.op("Reshape", q, g.ints(1, -1, spec.n_heads, spec.head_dim))
        by_head = g.op("Transpose", by_head, perm=[0, 2, 1, 3])
        nope, rope = g.ops("Split", by_head, g.ints(spec.nope_dim, spec.rope.dim), n_outputs=2, axis=-1)
        k_b = g.weight(f"{name}.k_b", w["attn_k_b.weight"].swapaxes(1, 2))  # (H, N, R)
        rope = rotate(g, rope, tables, spec.n_heads, spec.rope)
        return g.op("Concat", g.op("MatMul", nope, k_b), rope, axis=-1)

    def _row(self, x: Value, w: BlockWeights, tables: tuple[Value, Value], name: str, bits: Bits) -> Value:
        """What is cached of each token, (1, 1, T, W): the normed latent and the rotated rope key.

        Its weights keep 8 bits at least: every head and all later tokens see their error.
        """
        g, spec = self._g, self._spec
        kv = linear(g, x, f"{name}.kv_a", w["attn_kv_a_mqa.weight"], at_least_8(bits))
        widths = g.ints(spec.kv_lora_rank, spec.rope.dim)
        latent, key = g.ops("Split", g.op("Unsqueeze", kv, g.ints(0)), widths, n_outputs=2, axis=-1)
        norm = g.weight(f"{name}.kv_a_norm", w["attn_kv_a_norm.weight"])
        latent = g.op("RMSNormalization", latent, norm, epsilon=self._eps)
        return g.op("Concat", latent, rotate(g, key, tables, 1, spec.rope), axis=-1)

    def _attend(self, queries: Value, row: Value, layer: int) -> Value:
        """Cache the new rows, then attend: (1, H, T, W) and (1, 1, T, W) -> (H, T, W)."""
        g, width = self._g, self._spec.cache_values
        flat = g.op("Reshape", queries, g.ints(-1, width))  # (H*T, W)
        rows = self._store(f"{layer}.key", row, np.float32, width)
        rows = g.op("Reshape", rows, g.ints(-1, width))  # (S, W)
        return self._attend_to(flat, rows)

    def _attend_to(self, queries: Value, rows: Value) -> Value:
        """Queries (H*T, W) by rows (S, W), both float32: (H, T, W)."""
        g = self._g
        # The mask is added here and not by Gemm, which would want a copy of it for every head.
        scores = g.op("Reshape", g.op("Gemm", queries, rows, transB=1), self._score_shape)
        return g.op("MatMul", self._weights(scores), rows)

    def _weights(self, scores: Value) -> Value:
        """Attention weights of scores; where there is a cap the queries are divided by it."""
        g = self._g
        if self._spec.softcap:
            scores = g.op("Mul", g.op("Tanh", scores), g.scalar(self._spec.softcap))
        return g.op("Softmax", g.op("Add", scores, self._mask), axis=-1)

    def _store(self, name: str, new: Value, dtype: type[np.generic], width: int) -> Value:
        """Write new (1, 1, T, width) into a cache tensor; all its slots (1, 1, S, width)."""
        g = self._g
        shape = (1, 1, f"slots_of_window_{self._window}" if self._window else CACHE_LENGTH, width)
        past = g.input(f"past_key_values.{name}", dtype, shape)
        if self._mask is None:
            self._look_at(past)
        mode = "circular" if self._window else "linear"
        rows = g.op("TensorScatter", past, new, self._inputs.write_index, axis=2, mode=mode)
        return g.output(rows, f"present.{name}", dtype, shape)


class Int8LatentAttention(LatentAttention):
    """The same over a cache of 8-bit rows, each with its own scale: a quarter of the memory and the reading.

    Many tokens at once read rows that are expanded to float32, layer by layer. A single one would spend
    most of its time on that: its products are u8 by s8 or u8 by u8, which integer dot-product instructions do
    four or more per instruction. To leave the loss to the cache alone, the other operand has two digits: queries
    7 + 6 bits, which also keeps AVX2's 16-bit sums from overflowing, and attention weights 8 + 8 bits, for
    one digit would round the thousands of small ones beside a strong attention sink to 0.
    """

    def __init__(self, g: GraphWriter, spec: MLA, eps: float, inputs: LatentInputs) -> None:
        super().__init__(g, spec, eps, inputs)
        self._zero_point = g.constant(np.array(128, np.uint8))
        self._one = g.scalar(1.0)
        n_tokens = g.op("Size", inputs.position_ids)
        self._is_one_token = g.op("Equal", n_tokens, g.constant(np.array(1, np.int64)))

    def _look_at(self, past: Value) -> None:
        super()._look_at(past)
        n_slots = self._g.op("Shape", self._mask, start=1)
        self._zero_points = self._g.op("Expand", self._zero_point, n_slots)

    def _attend(self, queries: Value, row: Value, layer: int) -> Value:
        g, width = self._g, self._spec.cache_values
        scale = self._scale(row, 127)  # (1, 1, T, 1)
        codes = g.op("QuantizeLinear", g.op("Div", row, scale), self._one, self._zero_point)
        rows = self._store(f"{layer}.key", codes, np.uint8, width)
        scales = self._store(f"{layer}.key_scale", scale, np.float32, 1)
        scales = g.op("Reshape", scales, g.ints(1, -1))  # (1, S)
        mixed = g.either(
            self._is_one_token,
            lambda: self._attend_in_integers(queries, rows, scales),
            lambda: self._attend_in_floats(queries, rows, scales),
        )
        return g.op("Reshape", mixed, g.ints(self._spec.n_heads, -1, width))

    def _attend_in_floats(self, queries: Value, rows: Value, scales: Value) -> Value:
        """Attend to rows of codes (1, 1, S, W) with scales (1, S) that are expanded first: (H, T, W)."""
        g, width = self._g, self._spec.cache_values
        codes = g.op("Reshape", rows, g.ints(-1, width))
        exact = g.op(
            "DequantizeLinear", codes, g.op("Reshape", scales, g.ints(-1)), self._zero_points, axis=0
        )
        return self._attend_to(g.op("Reshape", queries, g.ints(-1, width)), exact)

    def _attend_in_integers(self, queries: Value, rows: Value, scales: Value) -> Value:
        """The same for one token, by products of integers: (1, H*W)."""
        g = self._g
        scores = g.op("Mul", self._scores(queries, rows), scales)
        return self._mix(self._weights(scores), rows, scales)

    def _scale(self, x: Value, levels: int) -> Value:
        """max |x| / levels over the last axis, which stays with length 1."""
        g = self._g
        peak = g.op("ReduceMax", g.op("Abs", x), g.ints(-1))
        return g.op("Max", g.op("Mul", peak, g.scalar(1 / levels)), g.scalar(TINY))

    def _scores(self, queries: Value, rows: Value) -> Value:
        """Queries (1, H, 1, W) by rows of codes (1, 1, S, W), before the rows' scales: (H, S)."""
        g, width = self._g, self._spec.cache_values
        scale = self._scale(queries, 63)  # (1, H, 1, 1)
        exact = g.op("Div", queries, scale)
        high = g.op("Round", exact)
        low = g.op("Round", g.op("Mul", g.op("Sub", exact, high), g.scalar(64)))
        digits = g.cast(g.op("Concat", high, low, axis=1), np.int8)  # (1, 2*H, 1, W)
        digits = g.op("Reshape", g.op("Transpose", digits, perm=[3, 0, 1, 2]), g.ints(width, -1))
        units = g.op("Reshape", g.op("Concat", scale, scale, axis=1), g.ints(-1))  # (2*H,)
        products = g.op(
            "MatMulIntegerToFloat",
            *(rows, digits, self._one, units, self._zero_point),
        )
        by_digit = g.op("Transpose", products, perm=[0, 1, 3, 2])  # (1, 1, 2*H, S)
        return g.op("Reshape", self._sum_digits(by_digit, 1 / 64), g.ints(self._spec.n_heads, -1))

    def _mix(self, weights: Value, rows: Value, scales: Value) -> Value:
        """Attention weights (H, S) by rows of codes (1, 1, S, W) and their scales (1, S): (1, H*W)."""
        g = self._g
        unit = g.op("Mul", g.op("ReduceMax", scales, keepdims=0), g.scalar(1 / 255))
        exact = g.op("Mul", weights, g.op("Div", scales, unit))  # 0 to 255
        high = g.cast(exact, np.uint8)  # truncates
        rest = g.op("Sub", exact, g.cast(high, np.float32))
        low = g.op("QuantizeLinear", rest, g.scalar(1 / 255), g.constant(np.array(0, np.uint8)))
        products = g.op(
            "MatMulIntegerToFloat",
            *(g.op("Concat", high, low, axis=0), rows, unit, self._one, None, self._zero_point),
        )  # (1, 1, 2*H, W)
        return self._sum_digits(products, 1 / 255)

    def _sum_digits(self, x: Value, low_unit: float) -> Value:
        """The first half of x plus the second times its unit, flat: (1, n/2). One pass, no copies."""
        g = self._g
        digit_units = g.constant(np.array([[1.0, low_unit]], np.float32))
        return g.op("MatMul", digit_units, g.op("Reshape", x, g.ints(2, -1)))
