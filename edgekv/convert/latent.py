"""Latent: the rank-r view of the input from which values, and keys beyond the rope key, are computed.

A whitened SVD: with M the stacked maps that the latent must serve and C the covariance of the inputs, the best
encoder is V_r^T C^(-1/2) and the best decoder C^(1/2) V_r, V_r the top right singular vectors of M C^(1/2).
Values are weighted by the output projection that reads them, keys by the queries. Values are not centred: the sink
token's value is near zero while it takes much of the attention, and centring would spend rank on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import RANK_STEP, Matrix, kept_by_rank, leading, sqrt_and_inverse
from edgekv.spec import GQA

# A leftover key has no RoPE in the latent, as if its angle were zero; averaged over distances up to this one, a
# frequency of speed w keeps sinc(w * DISTANCE) of itself, and nothing once that turns negative.
DISTANCE = 8.0  # tokens
# Of the largest energy; smaller ones are raised to it, so that directions without calibration text stay finite.
FLOOR = 1e-9


@dataclass(frozen=True)
class Latent:
    """encoder (R, D), decoder (D, R); keys (G, K, D): the leftover keys it serves, shrunk by frequency.

    kept: the share of the weighted energy of keys and values that the latent carries; kept_at: the same by rank.
    """

    encoder: Matrix
    decoder: Matrix
    keys: Matrix
    kept: float
    kept_at: dict[int, float]


def shrink_by_frequency(leftover: Matrix, gqa: GQA) -> Matrix:
    """Leftover keys (G, K, D), each frequency scaled by the share of it that survives without RoPE."""
    speed = inverse_frequencies(gqa.rope)
    turn = speed * DISTANCE
    shrink = np.where(turn < np.pi, np.sinc(turn / np.pi), 0.0)
    return np.asarray(leftover * np.repeat(shrink, 2)[None, :, None])


def joint_latent(value_rows: Matrix, key_rows: Matrix, covariance: Matrix, rank: int, keys: Matrix) -> Latent:
    """The best latent for stacked weighted rows, each (rows, D), under covariance (D, D)."""
    root, inverse_root = sqrt_and_inverse(covariance)
    stacked = np.concatenate([value_rows, key_rows]) @ root
    energy, vectors = np.linalg.eigh(stacked @ stacked.T)  # left singular vectors: rows are fewer than dims
    n = min(stacked.shape)  # no more can be other than zero
    energy, vectors = energy[-n:], vectors[:, -n:]
    scale = np.sqrt(np.maximum(energy, energy[-1] * FLOOR))
    top = stacked.T @ leading(vectors / scale, rank)  # right singular vectors, (D, R)
    return Latent(
        encoder=top.T @ inverse_root,
        decoder=root @ top,
        keys=keys,
        kept=float(energy[::-1][:rank].sum() / energy.sum()),
        kept_at=kept_by_rank(energy, range(RANK_STEP, len(value_rows) + len(key_rows) + 1, RANK_STEP)),
    )


def weighted_values(w_v: Matrix, w_o: Matrix) -> Matrix:
    """Value rows weighted by the heads that read them. w_v (G, K, D), w_o (H, D, K) -> (G * K, D)."""
    g = w_v.shape[0]
    readers = (w_o.swapaxes(1, 2) @ w_o).reshape(g, -1, *w_v.shape[1:2] * 2).sum(axis=1)
    return np.concatenate([sqrt_and_inverse(readers[i])[0] @ w_v[i] for i in range(g)])


def weighted_keys(keys: Matrix, w_q: Matrix, covariance: Matrix) -> Matrix:
    """Key rows weighted by the queries that read them. keys (G, K, D), w_q (H, K, D) -> (G * K, D)."""
    g, k = keys.shape[:2]
    readers = (w_q @ covariance @ w_q.swapaxes(1, 2)).reshape(g, -1, k, k).sum(axis=1)
    rows = [sqrt_and_inverse(readers[i])[0] @ keys[i] for i in range(g)]
    return np.asarray(np.concatenate(rows) / np.sqrt(k))
