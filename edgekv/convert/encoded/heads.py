"""Queries, keys and values of one window as the fit wants them: behind biases and norms, RoPE pairs as neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekv.reference.attention import queries_and_keys
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Floats
from edgekv.source import Array
from edgekv.spec import GQA, RopeSpec


@dataclass(frozen=True)
class HeadOrder:
    """Dims of a head (K,) in another order, times a gain: RoPE pairs lie side by side, and its magnitude is 1."""

    order: NDArray[np.int64]
    gain: Array

    def apply(self, heads: Array) -> Array:
        """Heads (..., K) in this order."""
        return np.asarray(heads[..., self.order] * self.gain, dtype=np.float32)

    def undo(self, readers: Floats) -> Floats:
        """Matrices (..., K) for heads as they are, from ones for heads in this order."""
        out = np.empty_like(readers)
        out[..., self.order] = readers * self.gain.astype(readers.dtype)
        return out


def plain_attention(gqa: GQA) -> tuple[GQA, HeadOrder]:
    """The attention behind biases, norms and order: all K dims in interleaved pairs, those without RoPE at speed 0."""
    k, p = gqa.head_dim, gqa.rope.dim
    order, gain = np.arange(k), np.ones(k, np.float32)
    if gqa.rope.layout == "half":
        order[0:p:2], order[1:p:2] = np.arange(p // 2), np.arange(p // 2, p)
    gain[:p] = gqa.rope.magnitude
    speeds = np.zeros(k // 2)
    speeds[: p // 2] = inverse_frequencies(gqa.rope) if p else 0.0
    plain = replace(gqa, bias=False, qk_norm=False, rope=rope_at(speeds))
    return plain, HeadOrder(order, gain)


def rope_at(speeds: NDArray[np.float64]) -> RopeSpec:
    """Interleaved pairs at these speeds, radians per token; 0 for one that does not turn."""
    with np.errstate(divide="ignore"):
        factors = 1.0 / speeds
    return RopeSpec(1.0, 2 * len(speeds), "interleaved", tuple(factors.tolist()))


def make_heads(x: Array, w: BlockWeights, gqa: GQA, order: HeadOrder, eps: float) -> tuple[Array, Array]:
    """Queries (T, H, K) before RoPE and what the encoder gets, keys and values (T, 2 * G * K), of normed inputs (T, D).

    Values come without their bias.
    """
    queries, keys = (order.apply(heads) for heads in queries_and_keys(x, w, gqa, gqa.n_heads, eps))
    values = x @ w["attn_v.weight"].T
    return queries, np.concatenate([keys.reshape(len(x), -1), values], axis=-1)


def value_bias_output(w: BlockWeights, gqa: GQA) -> Array:
    """What the values' bias adds to the attention's output, (D,), whatever is attended to."""
    w_o = w["attn_output.weight"]
    if not gqa.bias:
        return np.zeros(len(w_o), np.float32)
    heads = np.repeat(w["attn_v.bias"].reshape(gqa.n_kv_heads, -1), gqa.n_heads // gqa.n_kv_heads, axis=0)
    return np.asarray(w_o @ heads.reshape(-1), dtype=np.float32)
