"""One rope key for all heads: the complex principal component of the KV heads, frequency by frequency.

Written as complex numbers, a RoPE pair is multiplied by exp(i t theta_j), so any complex-linear mixing across KV
heads at the same frequency commutes with RoPE (TransMLA's real rotations, arXiv 2502.07864 section 4.1, are a
special case). At each frequency the shared key is the top principal component over the KV heads, weighted by the
energy of the queries that read them; the inverse mixing folds exactly into each query head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Matrix
from edgekv.rewrite.rope_pairs import Complex, to_complex, to_pairs
from edgekv.spec import GQA, RopeSpec


@dataclass(frozen=True)
class RopeKey:
    """encoder (P, D): rows of the shared key. query (H, P, K): maps each head's query to its rope query.

    leftover (G, K, D): the part of each head's key that the shared key does not carry.
    kept: the share of query-weighted key energy that the shared key carries.
    """

    encoder: Matrix
    query: Matrix
    leftover: Matrix
    kept: float


NEAR = 0.5  # of its own speed a pair may be off: standing still it is off by all of it


def frequency_slots(source: RopeSpec, target: RopeSpec) -> NDArray[np.int64]:
    """For each of the source's frequencies the target slot that turns at its speed, or -1.

    Slots that no pair has the speed of (those of scaled pairs) go to the pair that they are nearest to.
    """
    speed = inverse_frequencies(source)[:, None]
    off = np.abs(speed - inverse_frequencies(target)) / speed  # (K/2, P/2)
    nearest = off.argmin(axis=1)
    first = off.argmin(axis=0)[nearest] == np.arange(len(off))
    return np.where(first & (off.min(axis=1) <= NEAR), nearest, -1)


def shared_rope_key(w_q: Matrix, w_k: Matrix, covariance: Matrix, gqa: GQA, rope: RopeSpec) -> RopeKey:
    """Find the shared rope key. w_q (H, K, D), w_k (G, K, D), covariance (D, D) of the attention's inputs."""
    h, g, k, d = gqa.n_heads, gqa.n_kv_heads, gqa.head_dim, w_q.shape[-1]
    queries, keys = to_complex(w_q), to_complex(w_k)
    seen_queries, seen_keys = to_complex(w_q @ covariance), to_complex(w_k @ covariance)
    energy = np.einsum("hjd,hjd->hj", seen_queries, queries.conj()).real
    weight = np.sqrt(energy.reshape(g, h // g, -1).sum(axis=1) + 1e-12)  # (G, K/2)
    slots = frequency_slots(gqa.rope, rope)
    encoder = np.zeros((rope.dim // 2, d), np.complex128)
    # key (g, j) ~ sum_m mixing[g, j, m] * shared m
    mixing = np.zeros((g, k // 2, rope.dim // 2), np.complex128)
    leftover = keys.copy()
    kept = total = 0.0
    for j, slot in enumerate(slots):
        weighted = keys[:, j] * weight[:, j, None]  # (G, D)
        values, vectors = np.linalg.eigh((seen_keys[:, j] * weight[:, j, None]) @ weighted.conj().T)
        total += values.sum()
        if slot < 0:
            continue
        top = vectors[:, -1]
        kept += values[-1]
        encoder[slot] = top.conj() @ weighted
        mixing[:, j, slot] = top / weight[:, j]
        leftover[:, j] -= mixing[:, j, slot, None] * encoder[slot]
    return RopeKey(to_pairs(encoder), query_map(mixing, h), to_pairs(leftover), float(kept / total))


def query_map(mixing: Complex, n_heads: int) -> Matrix:
    """Real (H, P, K) maps of multiplying query pair j by conj(mixing[g, j, m]) and adding up into slot m."""
    g, pairs, slots = mixing.shape
    factor = np.repeat(mixing.conj(), n_heads // g, axis=0).swapaxes(1, 2)  # (H, slots, pairs)
    out = np.empty((n_heads, slots, 2, pairs, 2))
    out[:, :, 0, :, 0] = out[:, :, 1, :, 1] = factor.real
    out[:, :, 0, :, 1] = -factor.imag
    out[:, :, 1, :, 0] = factor.imag
    return out.reshape(n_heads, 2 * slots, 2 * pairs)
