"""Matrix functions against NumPy's and against what they promise to minimise."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.rewrite.linalg import factor, leading, ridge, sqrt_and_inverse

RNG = np.random.default_rng(0)


def covariance(n: int) -> np.ndarray:
    a = RNG.standard_normal((n, 3 * n)) * np.linspace(0.2, 3, n)[:, None]
    return a @ a.T / (3 * n)


def test_square_root_and_its_inverse() -> None:
    c = covariance(12)
    root, inverse = sqrt_and_inverse(c)
    np.testing.assert_allclose(root @ root, c, atol=1e-10)
    np.testing.assert_allclose(root @ inverse, np.eye(12), atol=1e-8)
    np.testing.assert_allclose(root, root.T, atol=1e-12)


def test_directions_never_seen_stay_finite() -> None:
    seen = RNG.standard_normal((12, 4))
    root, inverse = sqrt_and_inverse(seen @ seen.T)
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(root @ inverse, np.eye(12), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_factor_is_eckart_youngs_optimum(rank: int) -> None:
    matrix, c = RNG.standard_normal((8, 5)), covariance(5)
    root, inverse = sqrt_and_inverse(c)
    left, right = factor(matrix, root, inverse, rank)
    assert (left.shape, right.shape) == ((8, rank), (rank, 5))

    def error(product: np.ndarray) -> float:
        return float(np.trace((matrix - product) @ c @ (matrix - product).T))

    dropped = np.linalg.svd(matrix @ root, compute_uv=False)[rank:]
    assert error(left @ right) == pytest.approx(np.square(dropped).sum(), abs=1e-9)
    if rank < 5:
        for _ in range(20):
            other = (left + 0.05 * RNG.standard_normal(left.shape)) @ right
            assert error(other) > error(left @ right)


def test_leading_columns_are_padded_past_the_end() -> None:
    _, vectors = np.linalg.eigh(covariance(4))
    np.testing.assert_array_equal(leading(vectors, 2), vectors[:, [3, 2]])
    wide = leading(vectors, 7)
    assert wide.shape == (4, 7)
    np.testing.assert_array_equal(wide[:, 4:], 0)


def test_ridge_is_least_squares_and_shrinks() -> None:
    x, y = RNG.standard_normal((50, 6)), RNG.standard_normal((50, 2))
    exact = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(ridge(x.T @ x, x.T @ y, 0.0), exact, atol=1e-10)
    sizes = [np.linalg.norm(ridge(x.T @ x, x.T @ y, strength)) for strength in (0.0, 0.1, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.05 * sizes[0]
