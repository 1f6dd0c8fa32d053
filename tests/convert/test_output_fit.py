"""The refitted output maps against least squares."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.convert.output_fit import Moments, fit_outputs

T, H, R, D = 600, 3, 6, 10
RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((T, H, R)).astype(np.float32)


def moments(features: np.ndarray, target: np.ndarray) -> Moments:
    features = features.astype(np.float64)
    return Moments(features.T @ features, features.T @ target, len(features))


def fitted(
    mixed: np.ndarray, target: np.ndarray, start: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last fifth of the tokens held out."""
    features, seen = mixed.reshape(len(mixed), -1), len(mixed) * 4 // 5
    return fit_outputs(
        moments(features[:seen], target[:seen]), moments(features[seen:], target[seen:]), start, width
    )


def error(v_b: np.ndarray, w_o: np.ndarray, target: np.ndarray) -> float:
    given = np.einsum("thr,hvr,dhv->td", MIXED, v_b, w_o)
    return float(np.square(given - target).mean())


def test_it_finds_the_map_that_made_the_target() -> None:
    truth = RNG.standard_normal((D, H, R))
    target = np.einsum("thr,dhr->td", MIXED, truth).astype(np.float32)
    v_b, w_o = fitted(MIXED, target, truth + 0.3 * RNG.standard_normal(truth.shape), R)
    assert (v_b.shape, w_o.shape) == ((H, R, R), (D, H, R))
    assert error(v_b, w_o, target) < 1e-4 * np.square(target).mean()


@pytest.mark.parametrize("value_dim", [2, 4, R, 9])
def test_it_lowers_the_error_it_starts_from(value_dim: int) -> None:
    """Against a truth that is not linear, beside the start cut to the same width."""
    start = RNG.standard_normal((D, H, R))
    target = (np.einsum("thr,dhr->td", MIXED, start + 0.5) + 0.2 * RNG.standard_normal((T, D))).astype(
        np.float32
    )
    v_b, w_o = fitted(MIXED, target, start, value_dim)
    assert v_b.shape == (H, value_dim, R)
    cut_v, cut_w = np.zeros((H, value_dim, R)), np.zeros((D, H, value_dim))
    for h in range(H):
        u, s, vt = np.linalg.svd(start[:, h], full_matrices=False)
        n = min(value_dim, len(s))
        cut_w[:, h, :n], cut_v[h, :n] = u[:, :n] * s[:n], vt[:n]
    assert error(v_b, w_o, target) < error(cut_v, cut_w, target)
    least = np.linalg.lstsq(MIXED.reshape(T, -1), target, rcond=None)
    floor = float(np.square(MIXED.reshape(T, -1) @ least[0] - target).mean())
    if value_dim >= R:
        assert error(v_b, w_o, target) < 1.05 * floor


def test_noise_does_not_pull_it_off_its_start() -> None:
    """With fewer tokens than features the held-out part chooses a strong ridge: it stays near where it began."""
    few, start = MIXED[:16], RNG.standard_normal((D, H, R))
    noise = RNG.standard_normal((16, D))
    target = (np.einsum("thr,dhr->td", few, start) + noise).astype(np.float32)
    v_b, w_o = fitted(few, target, start, R)
    change = np.einsum("hvr,dhv->dhr", v_b, w_o) - start
    plain = np.linalg.pinv(few.reshape(16, -1)) @ noise  # what interpolating the noise would change
    assert np.linalg.norm(change) < np.linalg.norm(plain)


def test_nothing_held_out_means_nothing_changed() -> None:
    start, nothing = RNG.standard_normal((D, H, R)), moments(np.zeros((0, H * R)), np.zeros((0, D)))
    target = RNG.standard_normal((T, D)).astype(np.float32)
    v_b, w_o = fit_outputs(moments(MIXED.reshape(T, -1), target), nothing, start, R)
    np.testing.assert_allclose(np.einsum("hvr,dhv->dhr", v_b, w_o), start, rtol=1e-3, atol=1e-3)
