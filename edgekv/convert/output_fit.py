"""Refit the value up-projections and the output projection to what the compressed attention really gives.

Given the mixed latents of all heads (T, H, R), the map to the original's attention output (T, D) is a ridge
regression; each head's block (D, R) is then factored into W_o (D, V) and v_b (V, R), and W_o is fitted once more
behind the factored v_b.
"""

from __future__ import annotations

import numpy as np

from edgekv.convert.linalg import Matrix, ridge, sqrt_and_inverse
from edgekv.ops import per_head
from edgekv.source import Array

RIDGES = (
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
)  # of the mean diagonal; each layer takes the one its held-out part likes
HELD_OUT = 0.25  # of the tokens, the last ones, choose the ridge; the fit then uses all


def fit_outputs(mixed: Array, target: Array, start: Matrix, value_dim: int) -> tuple[Array, Array]:
    """v_b (H, V, R) and W_o (D, H, V) for mixed (T, H, R), target (T, D), start (D, H, R)."""
    n_tokens, h, r = mixed.shape
    features = mixed.reshape(n_tokens, h * r)
    fitted, gram = _fit_residual(features, target, start.reshape(-1, h * r))
    d = target.shape[1]
    v_b, w_o = np.zeros((h, value_dim, r)), np.zeros((d, h, value_dim))
    for i in range(h):
        block = slice(i * r, (i + 1) * r)
        root, inverse_root = sqrt_and_inverse(gram[block, block] / n_tokens, floor=1e-9)
        weighted = fitted[:, block] @ root
        _, vectors = np.linalg.eigh(weighted.T @ weighted)  # right singular vectors, from the small side
        top = vectors[:, ::-1][:, :value_dim]
        w_o[:, i, : top.shape[1]] = weighted @ top
        v_b[i, : top.shape[1]] = top.T @ inverse_root
    values = per_head(mixed, v_b.astype(np.float32))
    refitted, _ = _fit_residual(values.reshape(n_tokens, -1), target, w_o.reshape(d, -1))
    return v_b.astype(np.float32), refitted.reshape(d, h, value_dim).astype(np.float32)


def _fit_residual(features: Array, target: Array, start: Matrix) -> tuple[Matrix, Matrix]:
    """Ridge towards `start` (D, F): the new map (D, F) and the Gram matrix (F, F)."""
    residual = target - features @ start.T.astype(np.float32)
    seen = round(len(features) * (1 - HELD_OUT))
    gram, cross = _moments(features[:seen], residual[:seen])
    held_gram, held_cross = _moments(features[seen:], residual[seen:])

    def held_error(change: Matrix) -> float:
        """|residual - features @ change|^2 on the held-out tokens, but for a constant."""
        return float(np.sum(change * (held_gram @ change - 2 * held_cross)))

    best = min(RIDGES, key=lambda strength: held_error(ridge(gram, cross, strength)))
    change = ridge(gram + held_gram, cross + held_cross, best)
    return start + change.T, gram + held_gram


def _moments(features: Array, residual: Array) -> tuple[Matrix, Matrix]:
    """features^T features and features^T residual, in float64."""
    return (features.T @ features).astype(np.float64), (features.T @ residual).astype(np.float64)
