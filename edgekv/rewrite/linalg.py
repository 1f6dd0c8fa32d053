"""Matrix functions in float64: roots, low-rank factors, ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Floats = TypeVar("Floats", NDArray[np.float32], NDArray[np.float64])
RANK_STEP = 32  # between the ranks for which a conversion reports what a latent keeps


def sqrt_and_inverse(covariance: Matrix, floor: float = 1e-7) -> tuple[Matrix, Matrix]:
    """Symmetric square root of a positive semidefinite matrix, and the inverse of that root.

    Eigenvalues below `floor` times the largest are raised to it, so that directions the calibration text
    never used stay finite.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(values, values[-1] * floor))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def factor(matrix: Matrix, root: Matrix, inverse_root: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Best rank-`rank` factors of matrix (m, n) for inputs whose covariance is root @ root.

    Returns left (m, rank) and right (rank, n), the singular values shared evenly; columns past the matrix's
    own rank are zero. Eckart-Young on matrix @ root: the error E|M x - L R x|^2 is minimal.
    """
    u, s, vt = np.linalg.svd(matrix @ root, full_matrices=False)
    k = min(rank, len(s))
    left = np.zeros((matrix.shape[0], rank))
    right = np.zeros((rank, matrix.shape[1]))
    share = np.sqrt(s[:k])
    left[:, :k] = u[:, :k] * share
    right[:k] = (share[:, None] * vt[:k]) @ inverse_root
    return left, right


def leading(vectors: Matrix, rank: int) -> Matrix:
    """The last `rank` columns of eigenvectors (m, n) in np.linalg.eigh's order, strongest first: (m, rank).

    Past n the columns are zero: a latent wider than what it encodes has nothing more to hold.
    """
    out = np.zeros((len(vectors), rank))
    top = vectors[:, ::-1][:, :rank]
    out[:, : top.shape[1]] = top
    return out


def kept_by_rank(energy: NDArray[np.float64], ranks: Sequence[int]) -> dict[int, float]:
    """The share of ascending eigenvalues' sum that the largest `rank` hold, for each rank up to their number."""
    shares = energy[::-1].cumsum() / energy.sum()
    return {rank: float(shares[rank - 1]) for rank in ranks if rank <= len(shares)}


def ridge(gram: Floats, cross: Floats, strength: float) -> Floats:
    """Solve (gram + strength * mean(diag) * I) X = cross for X, in the precision of what is given."""
    damped = gram + (strength * np.trace(gram) / len(gram) * np.eye(len(gram))).astype(gram.dtype)
    return np.linalg.solve(damped, cross)
