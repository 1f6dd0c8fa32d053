"""What one layer does to one calibration window: the original's attention, the converted one's, the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.attention import attend
from edgekv.convert.layer import LayerMaps
from edgekv.convert.linalg import Matrix, factor, sqrt_and_inverse
from edgekv.convert.query_fit import Probe, rotate_rope_part
from edgekv.model import BlockWeights
from edgekv.ops import apply_rope, per_head, rms_norm, swiglu
from edgekv.source import Array
from edgekv.spec import GQA, MLA

PROBE_TOKENS = 256  # of a calibration window, for statistics that need its attention matrix


@dataclass(frozen=True)
class View:
    """The original's scores and attention (H, T, T) on the first tokens of a window."""

    scores: Array
    attention: Array


@dataclass(frozen=True)
class QueryRows:
    """attn_q (H, N + P, D) without the 1/sqrt(N + P) that the engine applies, and attn_k_b (H, R, N)."""

    rows: Array
    k_b: Array


def _project(x: Array, weight: Array, heads: int) -> Array:
    return (x @ weight.T).reshape(len(x), heads, -1)


def _rotated(x: Array, w: BlockWeights, gqa: GQA) -> tuple[Array, Array]:
    """Rotated queries (T, H, K) and keys (G, T, K) of normed inputs x (T, D)."""
    positions = np.arange(len(x))
    q = apply_rope(_project(x, w["attn_q.weight"], gqa.n_heads), positions, gqa.rope)
    k = apply_rope(_project(x, w["attn_k.weight"], gqa.n_kv_heads), positions, gqa.rope)
    return q, k.swapaxes(0, 1)


def gqa_output(x: Array, w: BlockWeights, gqa: GQA) -> Array:
    """The original's attention output (T, D) for normed inputs x (T, D)."""
    values = _project(x, w["attn_v.weight"], gqa.n_kv_heads).swapaxes(0, 1)
    mixed = attend(*_rotated(x, w, gqa), values, gqa.head_dim**-0.5)
    return mixed.reshape(len(x), -1) @ w["attn_output.weight"].T


def attention_view(x: Array, w: BlockWeights, gqa: GQA) -> View:
    """The original's attention on the first PROBE_TOKENS of normed inputs x (T, D)."""
    q, k = _rotated(x[:PROBE_TOKENS], w, gqa)
    keys = np.repeat(k, gqa.n_heads // gqa.n_kv_heads, axis=0)  # (H, T, K)
    scores = np.asarray((q.swapaxes(0, 1) * gqa.head_dim**-0.5) @ keys.swapaxes(1, 2), dtype=np.float32)
    attention = np.where(np.tri(len(keys[0]), dtype=bool), scores, np.float32(-np.inf))
    attention -= attention.max(axis=-1, keepdims=True)
    np.exp(attention, out=attention)
    attention /= attention.sum(axis=-1, keepdims=True)
    return View(scores, attention)


def probe(x: Array, w_q: Array, maps: LayerMaps, view: View, target: MLA) -> Probe:
    """What the query fit needs of one window, x (T, D) the converted model's normed inputs."""
    seen = x[: view.scores.shape[-1]]
    queries = (seen @ w_q.reshape(-1, seen.shape[1]).T).reshape(len(seen), *w_q.shape[:2])
    return Probe(queries, _cached_rows(seen, maps, target), view.scores, view.attention)


def _cached_rows(x: Array, maps: LayerMaps, target: MLA) -> Array:
    """What the converted layer caches for normed inputs x: (T, R + P), the rope key rotated."""
    rows = np.concatenate([x @ maps.latent.T, x @ maps.rope_key.T], axis=-1)
    return rotate_rope_part(rows[:, None], target, +1)[:, 0]


def query_rows(reading: Array, w_q: Array, covariance: Matrix, target: MLA) -> QueryRows:
    """Split each head's reading (R + P, K) of its query into attn_q rows and attn_k_b of rank N."""
    r, n = target.kv_lora_rank, target.nope_dim
    h, _, d = w_q.shape
    k_b = np.zeros((h, r, n), np.float32)
    rows = np.zeros((h, n + target.rope.dim, d), np.float32)
    for i in range(h):
        queries = w_q[i].astype(np.float64)
        root, inverse_root = sqrt_and_inverse(queries @ covariance @ queries.T)
        left, right = factor(reading[i, :r].astype(np.float64), root, inverse_root, n)
        k_b[i] = left
        rows[i] = np.concatenate([right, reading[i, r:]]) @ w_q[i]
    return QueryRows(rows, k_b)


def mixed_latents(x: Array, q: QueryRows, maps: LayerMaps, target: MLA) -> Array:
    """Attention over the cached rows: each head's weighted sum of latents, (T, H, R)."""
    n, r = target.nope_dim, target.kv_lora_rank
    queries = (x @ q.rows.reshape(-1, x.shape[1]).T).reshape(len(x), *q.rows.shape[:2])
    latent_part = per_head(queries[..., :n], q.k_b)
    full = rotate_rope_part(np.concatenate([latent_part, queries[..., n:]], axis=-1), target, +1)
    rows = _cached_rows(x, maps, target)[None]
    return attend(full, rows, rows[..., :r], 1.0)


def feed_forward(x: Array, w: BlockWeights, eps: float) -> Array:
    """x (T, D) and the block's feed-forward of it."""
    normed = rms_norm(x, w["ffn_norm.weight"], eps)
    return x + swiglu(normed, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])
