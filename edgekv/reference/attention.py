"""Attention of the reference model: GQA, and MLA in its naive and its absorbed form.

Each function projects normed inputs x (N, D), stores what its cache keeps, and returns (N, D): N tokens of one
sequence, or of several that advance together (edgekv/cache/store.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.store import KVCache
from edgekv.reference.ops import apply_rope, per_head, rms_norm, softcap
from edgekv.reference.probe import without_rope
from edgekv.source import Array
from edgekv.spec import GQA, MLA, Encoder, RopeSpec

MLAForm = Literal["absorbed", "naive"]
QUERY_CHUNK = 64  # query rows at once: their scores stay in L2, and most of the masked triangle is skipped


def attend(q: Array, k: Array, v: Array, scale: float, window: int = 0, cap: float = 0.0) -> Array:
    """Causal attention. q (..., T, H, K), k (..., G, S, K), v (..., G, S, V) -> (..., T, H, V).

    The T queries are the last T of the S cached tokens. Query heads share KV heads in blocks of H/G.
    With a `window` each sees only that many tokens, itself included; `cap` softcaps the scores.
    """
    *batch, n_tokens, n_heads, head_dim = q.shape
    n_groups, n_cached = k.shape[-3:-1]
    group = n_heads // n_groups
    queries = np.moveaxis(
        (q * np.float32(scale)).reshape(*batch, n_tokens, n_groups, group, head_dim), -4, -2
    )
    keys = k.swapaxes(-2, -1)  # (..., G, K, S)
    if n_tokens > 1:
        keys = np.ascontiguousarray(keys)  # one copy makes every chunk's GEMM fast
    out = np.empty((*batch, n_tokens, n_heads, v.shape[-1]), np.float32)
    first = n_cached - n_tokens
    for start in range(0, n_tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, n_tokens)
        rows, visible = stop - start, first + stop
        chunk = queries[..., start:stop, :].reshape(*batch, n_groups, group * rows, head_dim)
        scores = np.asarray(chunk @ keys[..., :visible], dtype=np.float32)  # (..., G, H/G * rows, visible)
        if cap:
            scores = softcap(scores, cap)
        by_query = scores.reshape(*batch, n_groups, group, rows, visible)
        by_query[..., visible - rows :] += np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
        if window:
            age = np.arange(first + start, visible)[:, None] - np.arange(visible)
            by_query[..., age >= window] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = scores @ v[..., :visible, :]
        mixed /= scores.sum(axis=-1, keepdims=True)  # normalised after mixing: fewer values to divide
        mixed = np.moveaxis(mixed.reshape(*batch, n_groups, group, rows, -1), -2, -4)
        out[..., start:stop, :, :] = mixed.reshape(*batch, rows, n_heads, -1)
    return out


def gqa_attention(
    x: Array, w: Mapping[str, Array], spec: GQA, cache: KVCache, layer: int, eps: float = 1e-6
) -> Array:
    """Grouped-query attention (arXiv 2305.13245); `eps` is QK-norm's."""
    n_rows = x.shape[0]
    positions = cache.positions(n_rows)
    q, k = (
        apply_rope(heads, positions, spec.rope) for heads in queries_and_keys(x, w, spec, spec.n_heads, eps)
    )
    v = x @ w["attn_v.weight"].T
    if spec.bias:
        v += w["attn_v.bias"]
    keys, values = cache.append(layer, k, v.reshape(k.shape))
    _show(cache, layer, q, keys, spec)
    mixed = attend(cache.by_sequence(q), keys, values, spec.score_scale, spec.window, spec.softcap)
    return mixed.reshape(n_rows, -1) @ w["attn_output.weight"].T


def queries_and_keys(
    x: Array, w: Mapping[str, Array], spec: GQA | Encoder, n_heads: int, eps: float
) -> tuple[Array, Array]:
    """Queries (N, H, K) and keys (N, G, K) of normed inputs x (N, D) before RoPE, behind biases and QK-norm."""

    def heads(kind: str, n: int) -> Array:
        flat = x @ w[f"attn_{kind}.weight"].T
        if spec.bias:
            flat += w[f"attn_{kind}.bias"]
        split: Array = flat.reshape(len(x), n, spec.head_dim)
        return rms_norm(split, w[f"attn_{kind}_norm.weight"], eps) if spec.qk_norm else split

    return heads("q", n_heads), heads("k", spec.n_kv_heads)


def encoded_attention(
    x: Array, w: Mapping[str, Array], spec: MLA, eps: float, cache: KVCache, layer: int
) -> Array:
    """Latent attention over rows that an encoder made of keys and values (edgekv.spec.Encoder), absorbed."""
    assert spec.encoder is not None
    n_rows, r = x.shape[0], spec.kv_lora_rank
    positions = cache.positions(n_rows)
    q, k = queries_and_keys(x, w, spec.encoder, spec.n_heads, eps)
    made = np.concatenate([k.reshape(n_rows, -1), x @ w["attn_v.weight"].T], axis=-1)  # (N, 2 * G * K)
    row = (made @ w["attn_kv_enc.weight"].T + w["attn_kv_enc.bias"])[:, None]  # (N, 1, R + P)
    rows, latents = cache.append(layer, rotate_behind(row, r, positions, spec.rope), None)
    queries = rotate_behind(per_head(q, w["attn_q_map.weight"]), r, positions, spec.rope)
    _show(cache, layer, queries, rows, spec)
    mixed = attend(cache.by_sequence(queries), rows, latents, spec.score_scale, spec.window, spec.softcap)
    values = per_head(mixed.reshape(n_rows, spec.n_heads, r), w["attn_v_b.weight"])
    return values.reshape(n_rows, -1) @ w["attn_output.weight"].T + w["attn_output.bias"]


def rotate_behind(x: Array, n_latent: int, positions: NDArray[np.int64], rope: RopeSpec) -> Array:
    """Rotate the dims of x (N, heads, dims) behind the first `n_latent`."""
    rotated = apply_rope(np.ascontiguousarray(x[..., n_latent:]), positions, rope)
    return np.concatenate([x[..., :n_latent], rotated], axis=-1)


def mla_attention(
    x: Array,
    w: Mapping[str, Array],
    spec: MLA,
    eps: float,
    cache: KVCache,
    layer: int,
    form: MLAForm = "absorbed",
) -> Array:
    """Multi-head latent attention (arXiv 2405.04434, eq. 9-19), over one cached row per token.

    "absorbed" multiplies each query by its head's k_b, so that every head reads the latent itself, as
    llama.cpp does; "naive" rebuilds each head's keys and values. The two are equal but for rounding.
    """
    n_rows, r = x.shape[0], spec.kv_lora_rank
    positions = cache.positions(n_rows)
    q = mla_queries(x, w, eps).reshape(n_rows, spec.n_heads, spec.head_dim)
    q_nope = q[..., : spec.nope_dim]
    q_rope = apply_rope(q[..., spec.nope_dim :], positions, spec.rope)

    compressed = x @ w["attn_kv_a_mqa.weight"].T  # (N, R + P)
    latent = rms_norm(compressed[:, :r], w["attn_kv_a_norm.weight"], eps)
    k_rope = apply_rope(compressed[:, None, r:], positions, spec.rope)
    row = np.concatenate([latent[:, None, :], k_rope], axis=-1)  # (N, 1, R + P)
    rows, latents = cache.append(layer, row, None)  # ([B,] 1, S, R + P), ([B,] 1, S, R)

    k_b, v_b = w["attn_k_b.weight"], w["attn_v_b.weight"]  # (H, R, N), (H, V, R)
    scale = spec.score_scale
    if form == "absorbed":
        queries = np.concatenate([per_head(q_nope, k_b), q_rope], axis=-1)
        _show(cache, layer, queries, rows, spec)
        mixed = attend(cache.by_sequence(queries), rows, latents, scale)
        mixed = per_head(mixed.reshape(n_rows, spec.n_heads, r), v_b)
    else:
        k_nope = latents @ k_b  # ([B,] H, S, N)
        shared_rope = np.broadcast_to(rows[..., r:], (*k_nope.shape[:-1], spec.rope.dim))
        keys = np.concatenate([k_nope, shared_rope], axis=-1)
        queries = np.concatenate([q_nope, q_rope], axis=-1)
        mixed = attend(cache.by_sequence(queries), keys, latents @ v_b.swapaxes(1, 2), scale)
    return mixed.reshape(n_rows, -1) @ w["attn_output.weight"].T


def _show(cache: KVCache, layer: int, queries: Array, keys: Array, spec: GQA | MLA) -> None:
    """Show queries (T, H, K) to who observes the cache, if somebody does."""
    if cache.observer is not None:
        scaled = queries * np.float32(spec.score_scale)
        cache.observer.see(layer, scaled, keys, spec.softcap)
        if cache.observer.wants_statistics:
            cache.observer.add(layer, without_rope(scaled, cache.n_past, spec), cache.n_past)


def mla_queries(x: Array, w: Mapping[str, Array], eps: float) -> Array:
    """Queries (T, H * (N + P)) before RoPE, straight from x (T, D) or through the bottleneck."""
    if "attn_q.weight" in w:
        return x @ w["attn_q.weight"].T
    compressed = rms_norm(x @ w["attn_q_a.weight"].T, w["attn_q_a_norm.weight"], eps)
    return compressed @ w["attn_q_b.weight"].T
