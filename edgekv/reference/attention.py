"""Attention of the reference model: GQA, and MLA in its naive and its absorbed form.

Each function projects normed inputs x (T, D), stores what its cache keeps, and returns (T, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgekv.cache.store import KVCache
from edgekv.reference.ops import apply_rope, per_head, rms_norm, softcap
from edgekv.source import Array
from edgekv.spec import GQA, MLA

Weights = Mapping[str, Array]
MLAForm = Literal["absorbed", "naive"]
QUERY_CHUNK = 64  # query rows at once: their scores stay in L2, and most of the masked triangle is skipped


def attend(q: Array, k: Array, v: Array, scale: float, window: int = 0, cap: float = 0.0) -> Array:
    """Causal attention. q (T, H, K), k (G, S, K), v (G, S, V) -> (T, H, V).

    The T queries are the last T of the S cached tokens. Query heads share KV heads in blocks of H/G.
    With a `window` each sees only so many tokens, itself included; `cap` softcaps the scores.
    """
    n_tokens, n_heads, head_dim = q.shape
    n_groups, n_cached, _ = k.shape
    group = n_heads // n_groups
    queries = (q * np.float32(scale)).reshape(n_tokens, n_groups, group, head_dim).transpose(1, 2, 0, 3)
    keys = np.ascontiguousarray(k.swapaxes(1, 2))  # (G, K, S): one copy makes every chunk's GEMM fast
    out = np.empty((n_tokens, n_heads, v.shape[-1]), np.float32)
    first = n_cached - n_tokens
    for start in range(0, n_tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, n_tokens)
        rows, visible = stop - start, first + stop
        chunk = queries[:, :, start:stop].reshape(n_groups, group * rows, head_dim)
        scores = np.asarray(chunk @ keys[:, :, :visible], dtype=np.float32)  # (G, H/G * rows, visible)
        if cap:
            scores = softcap(scores, cap)
        future = np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
        scores.reshape(n_groups, group, rows, visible)[..., visible - rows :] += future
        if window:
            age = np.arange(first + start, visible)[:, None] - np.arange(visible)
            scores.reshape(n_groups, group, rows, visible)[..., age >= window] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = scores @ v[:, :visible]
        mixed /= scores.sum(axis=-1, keepdims=True)  # normalised after mixing: fewer values to divide
        out[start:stop] = (
            mixed.reshape(n_groups, group, rows, -1).transpose(2, 0, 1, 3).reshape(rows, n_heads, -1)
        )
    return out


def gqa_attention(x: Array, w: Weights, spec: GQA, cache: KVCache, layer: int, eps: float = 1e-6) -> Array:
    """Grouped-query attention (arXiv 2305.13245); `eps` is that of QK-norm."""
    n_tokens = x.shape[0]
    positions = np.arange(cache.n_past, cache.n_past + n_tokens)

    def heads(kind: str, n_heads: int) -> Array:
        flat = x @ w[f"attn_{kind}.weight"].T
        if spec.bias:
            flat += w[f"attn_{kind}.bias"]
        split: Array = flat.reshape(n_tokens, n_heads, spec.head_dim)
        return rms_norm(split, w[f"attn_{kind}_norm.weight"], eps) if spec.qk_norm and kind != "v" else split

    q = apply_rope(heads("q", spec.n_heads), positions, spec.rope)
    k = apply_rope(heads("k", spec.n_kv_heads), positions, spec.rope)
    keys, values = cache.append(layer, k, heads("v", spec.n_kv_heads))
    mixed = attend(q, keys, values, spec.score_scale, spec.window, spec.softcap)
    return mixed.reshape(n_tokens, -1) @ w["attn_output.weight"].T


def mla_attention(
    x: Array, w: Weights, spec: MLA, eps: float, cache: KVCache, layer: int, form: MLAForm = "absorbed"
) -> Array:
    """Multi-head latent attention (arXiv 2405.04434, eq. 9-19), over one cached row a token.

    "absorbed" multiplies each query by its head's k_b, so that every head reads the latent itself, as
    llama.cpp does; "naive" rebuilds each head's keys and values. The two are equal but for rounding.
    """
    n_tokens, r = x.shape[0], spec.kv_lora_rank
    positions = np.arange(cache.n_past, cache.n_past + n_tokens)
    q = mla_queries(x, w, eps).reshape(n_tokens, spec.n_heads, spec.head_dim)
    q_nope = q[..., : spec.nope_dim]
    q_rope = apply_rope(q[..., spec.nope_dim :], positions, spec.rope)

    compressed = x @ w["attn_kv_a_mqa.weight"].T  # (T, R + P)
    latent = rms_norm(compressed[:, :r], w["attn_kv_a_norm.weight"], eps)
    k_rope = apply_rope(compressed[:, None, r:], positions, spec.rope)
    row = np.concatenate([latent[:, None, :], k_rope], axis=-1)  # (T, 1, R + P)
    rows, latents = cache.append(layer, row, None)  # (1, S, R + P), (1, S, R)

    k_b, v_b = w["attn_k_b.weight"], w["attn_v_b.weight"]  # (H, R, N), (H, V, R)
    scale = spec.score_scale
    if form == "absorbed":
        q_latent = per_head(q_nope, k_b)
        mixed = attend(np.concatenate([q_latent, q_rope], axis=-1), rows, latents, scale)  # (T, H, R)
        mixed = per_head(mixed, v_b)
    else:
        k_nope = latents @ k_b  # (H, S, N)
        shared_rope = np.broadcast_to(rows[..., r:], (spec.n_heads, rows.shape[1], spec.rope.dim))
        keys = np.concatenate([k_nope, shared_rope], axis=-1)
        queries = np.concatenate([q_nope, q_rope], axis=-1)
        mixed = attend(queries, keys, latents @ v_b.swapaxes(1, 2), scale)
    return mixed.reshape(n_tokens, -1) @ w["attn_output.weight"].T


def mla_queries(x: Array, w: Weights, eps: float) -> Array:
    """Queries (T, H * (N + P)) before RoPE, straight from x (T, D) or through the bottleneck."""
    if "attn_q.weight" in w:
        return x @ w["attn_q.weight"].T
    compressed = rms_norm(x @ w["attn_q_a.weight"].T, w["attn_q_a_norm.weight"], eps)
    return compressed @ w["attn_q_b.weight"].T
