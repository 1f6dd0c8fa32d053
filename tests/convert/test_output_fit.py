"""The refitted output maps against least squares."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.convert.output_fit import Moments, fit_outputs, fit_towards

T, H, R, D = 600, 3, 6, 10
RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((T, H, R)).astype(np.float32)


def moments(features: np.ndarray, target: np.ndarray) -> Moments:
    features = features.astype(np.float64)
    return Moments(features.T @ features, features.T @ target, len(features))


NOTHING = moments(np.zeros((0, H * R)), np.zeros((0, D)))


def fitted(
    mixed: np.ndarray, target: np.ndarray, start: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last fifth of the tokens held out."""
    features, seen = mixed.reshape(len(mixed), -1), len(mixed) * 4 // 5
    parts = moments(features[:seen], target[:seen]), moments(features[seen:], target[seen:])
    return fit_outputs(*parts, NOTHING, start, width)


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
    start = RNG.standard_normal((D, H, R))
    target = RNG.standard_normal((T, D)).astype(np.float32)
    v_b, w_o = fit_outputs(moments(MIXED.reshape(T, -1), target), NOTHING, NOTHING, start, R)
    np.testing.assert_allclose(np.einsum("hvr,dhv->dhr", v_b, w_o), start, rtol=1e-3, atol=1e-3)


def test_text_of_other_kinds_holds_a_fit_back_but_is_not_fitted() -> None:
    """Features that the seen text never uses: only the other text says what a change of the others does to it."""
    seen, other = MIXED.reshape(T, -1).copy(), MIXED.reshape(T, -1)
    seen[:, 1::2] = 1.5 * seen[:, ::2]  # the seen text is narrow: half of its features follow from the others
    start = RNG.standard_normal((D, H * R))
    target = seen @ (start + 0.5 * RNG.standard_normal(start.shape)).T
    parts = moments(seen[: T // 2], target[: T // 2]), moments(seen[T // 2 :], target[T // 2 :])
    elsewhere = moments(other, other @ start.T)

    def losses(judge: Moments) -> tuple[float, float]:
        fit = fit_towards(start, *parts, judge)
        here = np.square(seen @ fit.T - target).mean()
        return float(here), float(np.square(other @ fit.T - other @ start.T).mean())

    free, held_back = losses(NOTHING), losses(elsewhere)
    assert held_back[1] < free[1]
    assert held_back[0] > free[0]
