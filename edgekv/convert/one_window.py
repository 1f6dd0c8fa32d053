"""One layer on one calibration window: the original's attention, the converted one's, the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.convert.methods import LayerMaps
from edgekv.convert.query_fit import Probe, rotate_rope_part
from edgekv.reference.attention import attend
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import apply_rope, per_head, rms_norm, swiglu
from edgekv.rewrite.linalg import Matrix, factor, sqrt_and_inverse
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
    """attn_q (H, N + P, D) without the 1/sqrt(N + P) that the engine applies, and attn_k_b (H, R, N).

    query_map (H, R + P, K): both of them as maps of each head's original query.
    """

    rows: Array
    k_b: Array
    query_map: Array


def _project(x: Array, weight: Array, heads: int) -> Array:
    return (x @ weight.T).reshape(len(x), heads, -1)


def _rotated_keys(x: Array, w: BlockWeights, gqa: GQA) -> Array:
    """Keys (G, T, K) of normed inputs x (T, D)."""
    keys = _project(x, w["attn_k.weight"], gqa.n_kv_heads)
    return apply_rope(keys, np.arange(len(x)), gqa.rope).swapaxes(0, 1)


def gqa_mixed(x: Array, w: BlockWeights, gqa: GQA) -> tuple[Array, Array]:
    """The original's queries before RoPE (T, H, K), and its mixed values (T, H * K), of normed inputs x (T, D)."""
    queries = _project(x, w["attn_q.weight"], gqa.n_heads)
    values = _project(x, w["attn_v.weight"], gqa.n_kv_heads).swapaxes(0, 1)
    rotated = apply_rope(queries, np.arange(len(x)), gqa.rope)
    mixed = attend(rotated, _rotated_keys(x, w, gqa), values, gqa.head_dim**-0.5)
    return queries, mixed.reshape(len(x), -1)


def attention_view(x: Array, w: BlockWeights, gqa: GQA) -> View:
    """The original's attention on the first PROBE_TOKENS of normed inputs x (T, D)."""
    x = x[:PROBE_TOKENS]
    queries = apply_rope(_project(x, w["attn_q.weight"], gqa.n_heads), np.arange(len(x)), gqa.rope)
    keys = np.repeat(_rotated_keys(x, w, gqa), gqa.n_heads // gqa.n_kv_heads, axis=0)  # (H, T, K)
    scores = np.asarray((queries.swapaxes(0, 1) * gqa.head_dim**-0.5) @ keys.swapaxes(1, 2), dtype=np.float32)
    attention = np.where(np.tri(len(keys[0]), dtype=bool), scores, np.float32(-np.inf))
    attention -= attention.max(axis=-1, keepdims=True)
    np.exp(attention, out=attention)
    attention /= attention.sum(axis=-1, keepdims=True)
    return View(scores, attention)


def attended_moment(x: Array, view: View) -> Array:
    """The second moment (D, D) of inputs mixed by attention, sum_s p_hs x_s, over the queries and heads of a view."""
    pairs = (view.attention.swapaxes(1, 2) @ view.attention).mean(axis=0)  # E_h[p_h^T p_h], (S, S)
    seen = x[: len(pairs)]
    return np.asarray(seen.T @ pairs @ seen / np.float32(len(pairs)))


def probe(x: Array, queries: Array, maps: LayerMaps, view: View, target: MLA) -> Probe:
    """What the query fit needs of one window: x (T, D) the converted model's normed inputs, queries (T, H, K)."""
    seen = view.scores.shape[-1]
    return Probe(queries[:seen], _cached_rows(x[:seen], maps, target), view.scores, view.attention)


def _cached_rows(x: Array, maps: LayerMaps, target: MLA) -> Array:
    """What the converted layer caches for normed inputs x: (T, R + P), the rope key rotated."""
    rows = np.concatenate([x @ maps.latent.T, x @ maps.rope_key.T], axis=-1)
    return rotate_rope_part(rows[:, None], target, +1)[:, 0]


def query_rows(query_map: Array, w_q: Array, covariance: Matrix, target: MLA) -> QueryRows:
    """Split each head's query map (R + P, K) into attn_q rows and attn_k_b of rank N."""
    r, n = target.kv_lora_rank, target.nope_dim
    h, _, d = w_q.shape
    k_b = np.zeros((h, r, n), np.float32)
    rows = np.zeros((h, n + target.rope.dim, d), np.float32)
    query_map = query_map.copy()
    for i in range(h):
        queries = w_q[i].astype(np.float64)
        root, inverse_root = sqrt_and_inverse(queries @ covariance @ queries.T)
        left, right = factor(query_map[i, :r].astype(np.float64), root, inverse_root, n)
        k_b[i] = left
        rows[i] = np.concatenate([right, query_map[i, r:]]) @ w_q[i]
        query_map[i, :r] = left @ right
    return QueryRows(rows, k_b, query_map)


def mixed_latents(x: Array, queries: Array, query_map: Array, maps: LayerMaps, target: MLA) -> Array:
    """Attention over the cached rows: each head's weighted sum of latents, (T, H * R).

    x (T, D) normed inputs, queries (T, H, K) the original's, query_map (H, R + P, K) their maps to cached rows.
    """
    rows = _cached_rows(x, maps, target)[None]
    full = rotate_rope_part(per_head(queries, query_map), target, +1)
    return attend(full, rows, rows[..., : target.kv_lora_rank], 1.0).reshape(len(x), -1)


def feed_forward(x: Array, w: BlockWeights, eps: float) -> Array:
    """x (T, D) and the block's feed-forward of it."""
    normed = rms_norm(x, w["ffn_norm.weight"], eps)
    return x + swiglu(normed, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])
