"""Output fit: value up-projections and the output projection, refitted to the output of the compressed attention.

Given the mixed latents of all heads (T, H, R), the map to the original's attention output (T, D) is a ridge
regression; each head's block (D, R) is then factored into W_o (D, V) and v_b (V, R), and W_o is fitted once more
behind the factored v_b. Only second moments are needed, so no activation has to be kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.rewrite.linalg import Matrix, ridge, sqrt_and_inverse
from edgekv.source import Array

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # of the mean diagonal; the held-out part chooses
HELD_OUT = 0.2  # of the windows, the last ones, choose the ridge; the fit then uses all


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: gram (F, F) of features with themselves, cross (F, D) with their targets."""

    gram: Matrix
    cross: Matrix
    n_tokens: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.n_tokens + other.n_tokens)

    def behind(self, v_b: Matrix) -> Moments:
        """The moments of each head's own R features @ v_b[h].T, v_b (H, V, R), of which there are H * V."""
        gram = _per_block(_per_block(self.gram, v_b).T, v_b)
        return Moments(gram, _per_block(self.cross.T, v_b).T, self.n_tokens)

    def residual(self, weight: Matrix) -> Matrix:
        """Sums over tokens of features with what weight (F, D) leaves of the targets: (F, D)."""
        return np.asarray(self.cross - self.gram @ weight)

    def error(self, weight: Matrix, energy: float) -> float:
        """|targets - features @ weight|^2, weight (F, D), energy the targets' |.|^2; at least 0."""
        explained = float(np.sum(weight * (2 * self.cross - self.gram @ weight)))
        return max(energy - explained, 0.0)


def _per_block(rows: Matrix, v_b: Matrix) -> Matrix:
    """rows (n, H * R) with each block of R mapped by its head's v_b (H, V, R): (n, H * V)."""
    h, v, r = v_b.shape
    blocks = rows.reshape(-1, h, r).swapaxes(0, 1) @ v_b.swapaxes(1, 2)  # (H, n, V)
    return np.ascontiguousarray(blocks.swapaxes(0, 1)).reshape(-1, h * v)


def fit_outputs(
    seen: Moments, held_out: Moments, elsewhere: Moments | None, start: Matrix, value_dim: int
) -> tuple[Array, Array]:
    """v_b (H, V, R) and W_o (D, H, V) for features of H * R mixed latents and start (D, H, R)."""
    d, h, r = start.shape
    fitted = fit_towards(start.reshape(d, -1), seen, held_out, elsewhere)
    gram = (seen.gram + held_out.gram) / (seen.n_tokens + held_out.n_tokens)
    v_b, w_o = np.zeros((h, value_dim, r)), np.zeros((d, h, value_dim))
    for i in range(h):
        block = slice(i * r, (i + 1) * r)
        root, inverse_root = sqrt_and_inverse(gram[block, block], floor=1e-9)
        weighted = fitted[:, block] @ root
        _, vectors = np.linalg.eigh(weighted.T @ weighted)  # right singular vectors, from the small side
        top = vectors[:, ::-1][:, :value_dim]
        w_o[:, i, : top.shape[1]] = weighted @ top
        v_b[i, : top.shape[1]] = top.T @ inverse_root
    beyond = elsewhere.behind(v_b) if elsewhere is not None else None
    refitted = fit_towards(w_o.reshape(d, -1), seen.behind(v_b), held_out.behind(v_b), beyond)
    return v_b.astype(np.float32), refitted.reshape(d, h, value_dim).astype(np.float32)


def fit_towards(start: Matrix, seen: Moments, held_out: Moments, elsewhere: Moments | None = None) -> Matrix:
    """Ridge regression (D, F) drawn to `start`, which is kept where no ridge helps on text that is not fitted.

    The held-out part chooses the strength together with text of other kinds, and is fitted in the end; that text never.
    """
    judge = held_out if elsewhere is None else held_out + elsewhere
    residual, judge_residual = seen.residual(start.T), judge.residual(start.T)
    best, least = None, 0.0
    # float32 is enough to choose a strength.
    gram, aim, judge_gram = (m.astype(np.float32) for m in (seen.gram, residual, judge.gram))
    for strength in RIDGES:  # from the strongest: the error falls, then rises
        change = ridge(gram, aim, strength)
        # |target - features @ fit|^2 on the judge's tokens, less the same of `start`
        error = float(np.sum(change * (judge_gram @ change - 2 * judge_residual)))
        if error >= least:
            break
        best, least = strength, error
    if best is None:
        return start
    residual = residual + held_out.residual(start.T)
    return start + ridge(seen.gram + held_out.gram, residual, best).T
