"""The joint latent against the error it minimises, and the weights against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.convert.latent import joint_latent, shrink_by_frequency, weighted_keys, weighted_values
from edgekv.spec import GQA, RopeSpec

RNG = np.random.default_rng(0)
D = 16
INPUTS = RNG.standard_normal((500, D)) @ RNG.standard_normal((D, D)) / 4
COVARIANCE = INPUTS.T @ INPUTS / len(INPUTS)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_other_latent_loses_less(rank: int) -> None:
    values, keys = RNG.standard_normal((6, D)), RNG.standard_normal((4, D))
    latent = joint_latent(values, keys, COVARIANCE, rank, keys[None])
    stacked = np.concatenate([values, keys])

    def lost(encoder: np.ndarray, decoder: np.ndarray) -> float:
        return float(np.square(stacked @ (INPUTS.T - decoder @ encoder @ INPUTS.T)).sum() / len(INPUTS))

    energy = float(np.square(stacked @ INPUTS.T).sum() / len(INPUTS))
    singular = np.linalg.svd(stacked @ INPUTS.T / np.sqrt(len(INPUTS)), compute_uv=False)
    best = float(np.square(singular[rank:]).sum())  # Eckart-Young on the outputs themselves
    assert lost(latent.encoder, latent.decoder) == pytest.approx(best, rel=1e-6)
    assert latent.kept == pytest.approx(1 - best / energy, rel=1e-6)


def test_enough_rank_loses_nothing() -> None:
    values, keys = RNG.standard_normal((5, D)), RNG.standard_normal((3, D))
    for rank in (8, D, D + 7):
        latent = joint_latent(values, keys, COVARIANCE, rank, keys[None])
        assert (latent.encoder.shape, latent.decoder.shape) == ((rank, D), (D, rank))
        np.testing.assert_allclose(values @ latent.decoder @ latent.encoder, values, atol=1e-6)
        assert latent.kept == pytest.approx(1)


def test_the_curve_tells_what_other_ranks_would_keep() -> None:
    values, keys = RNG.standard_normal((40, 80)), RNG.standard_normal((40, 80))
    covariance = np.cov(RNG.standard_normal((80, 200)))
    curve = joint_latent(values, keys, covariance, 8, keys[None]).kept_at
    assert list(curve) == [32, 64]
    for rank, share in curve.items():
        assert share == pytest.approx(joint_latent(values, keys, covariance, rank, keys[None]).kept)


def test_value_weights_are_the_output_error() -> None:
    """|W v'| over the weighted rows is what the output projections of the group make of an error in v."""
    g, heads, k = 2, 6, 4
    w_v, w_o = RNG.standard_normal((g, k, D)), RNG.standard_normal((heads, D, k))
    rows = weighted_values(w_v, w_o)
    x = RNG.standard_normal(D)
    expected = sum(np.square(w_o[h] @ w_v[h // 3] @ x).sum() for h in range(heads))
    assert np.square(rows @ x).sum() == pytest.approx(expected, rel=1e-5)


def test_key_weights_are_the_score_error() -> None:
    g, heads, k = 2, 6, 4
    keys, w_q = RNG.standard_normal((g, k, D)), RNG.standard_normal((heads, k, D))
    rows = weighted_keys(keys, w_q, COVARIANCE)
    x = RNG.standard_normal(D)
    scores = [np.square(INPUTS @ w_q[h].T @ keys[h // 3] @ x).mean() / k for h in range(heads)]
    assert np.square(rows @ x).sum() == pytest.approx(sum(scores), rel=1e-5)


def test_slow_frequencies_survive_without_rope_and_fast_ones_do_not() -> None:
    gqa = GQA(2, 1, 8, RopeSpec(10000.0, 8))
    shrunk = shrink_by_frequency(np.ones((1, 8, D)), gqa)[0, :, 0]
    np.testing.assert_array_equal(shrunk[0::2], shrunk[1::2])
    assert shrunk[0] == 0, "turns by more than a half within the distance"
    assert shrunk[6] == pytest.approx(1, abs=1e-3)
    assert (np.diff(shrunk[0::2]) >= 0).all()
