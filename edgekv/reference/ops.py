"""NumPy building blocks of a transformer, in float32.

Letters for shapes are those of edgekv/spec.py: T tokens, S cached tokens, D width, H query heads,
G KV heads, K head dim, R latent rank, P rope dims, N no-rope dims, V value dims per head.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, floor, log, pi

import numpy as np
from numpy.typing import NDArray

from edgekv.source import Array
from edgekv.spec import RopeSpec, Yarn


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight, dtype=np.float32)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """SwiGLU feed-forward (arXiv 2002.05202). x (T, D); gate, up (F, D); down (D, F)."""
    g = x @ gate.T
    with np.errstate(over="ignore"):  # exp(-g) = inf gives the right limit, g * sigmoid(g) = 0
        g /= 1.0 + np.exp(-g)
    g *= x @ up.T
    return np.asarray(g @ down.T, dtype=np.float32)


def geglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """GeGLU feed-forward (arXiv 2002.05202) with the tanh form of GELU. Shapes as in `swiglu`."""
    g = x @ gate.T
    inner = np.float32(np.sqrt(2 / np.pi)) * (g + np.float32(0.044715) * g**3)
    g *= 0.5 * (1.0 + np.tanh(inner))
    g *= x @ up.T
    return np.asarray(g @ down.T, dtype=np.float32)


def softcap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap): values stay within +-cap (arXiv 2408.00118, section 2); 0 leaves x alone."""
    return np.asarray(np.tanh(x / np.float32(cap)) * np.float32(cap), dtype=np.float32) if cap else x


def relu_squared(x: Array, up: Array, down: Array) -> Array:
    """Squared-ReLU feed-forward (arXiv 2109.08668). x (T, D); up (F, D); down (D, F)."""
    return np.asarray(np.square(np.maximum(x @ up.T, 0.0)) @ down.T, dtype=np.float32)


def inverse_frequencies(rope: RopeSpec) -> NDArray[np.float64]:
    """theta^(-2j/P) / factor_j of each pair, (P/2,); with YaRN the ramp of arXiv 2309.00071, eq. 21-23."""
    inv_freq = rope.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.factors:
        inv_freq = inv_freq / np.asarray(rope.factors)
    return _yarn(inv_freq, rope, rope.yarn) if rope.yarn else inv_freq


def _yarn(inv_freq: NDArray[np.float64], rope: RopeSpec, yarn: Yarn) -> NDArray[np.float64]:
    """Ramp bounds are rounded outwards, as transformers and ggml_rope_yarn_corr_dims have them."""

    def pair_that_turns(times: float) -> float:
        return rope.dim * log(yarn.original_context / (times * 2 * pi)) / (2 * log(rope.theta))

    low = max(floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(ceil(pair_that_turns(yarn.beta_slow)), rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(inv_freq * (1 - ramp) + inv_freq / yarn.factor * ramp)


def rope_tables(positions: NDArray[np.int64], rope: RopeSpec) -> tuple[Array, Array]:
    """cos and sin of position * inverse frequency, times the magnitude, each (T, P/2)."""
    turns = _turns(positions.astype(np.int64).tobytes(), rope)
    return turns.real, turns.imag


@lru_cache(maxsize=16)  # every layer and window asks for the same
def _turns(positions: bytes, rope: RopeSpec) -> NDArray[np.complex64]:
    """exp(i * position * inverse frequency) times the magnitude, (T, P/2); positions are int64."""
    angle = np.frombuffer(positions, np.int64)[:, None] * inverse_frequencies(rope)[None, :]
    turns = np.asarray(np.exp(1j * angle) * rope.magnitude, np.complex64)
    turns.flags.writeable = False
    return turns


def apply_rope(x: Array, positions: NDArray[np.int64], rope: RopeSpec) -> Array:
    """Rotate the first rope.dim dims of x (T, heads, dims) by position (arXiv 2104.09864, eq. 34)."""
    if not rope.dim:
        return x
    out = np.array(x, np.float32, order="C")
    if rope.layout == "interleaved" and rope.dim == x.shape[-1]:
        pairs = out.view(np.complex64)  # a pair of dims is a complex number: one pass, 20 times as fast
        pairs *= _turns(positions.astype(np.int64).tobytes(), rope)[:, None, :]
        return out
    cos, sin = (table[:, None, :] for table in rope_tables(positions, rope))
    if rope.layout == "interleaved":
        even, odd = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    else:
        even, odd = slice(0, rope.dim // 2), slice(rope.dim // 2, rope.dim)
    a, b = x[..., even], x[..., odd]
    out[..., even] = a * cos - b * sin
    out[..., odd] = a * sin + b * cos
    return out


def per_head(x: Array, weight: Array) -> Array:
    """Apply each head's matrix: x (T, H, A), weight (H, B, A) -> (T, H, B).

    A stack of GEMMs; np.einsum would loop over the heads without BLAS.
    """
    return np.ascontiguousarray(x.swapaxes(0, 1) @ weight.swapaxes(1, 2)).swapaxes(0, 1)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)


def kl_rows(log_p: NDArray[np.floating], log_q: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(p || q) of each row in nats, from log-probabilities (..., vocab)."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1, dtype=np.float64))
