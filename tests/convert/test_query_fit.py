"""The refitted queries against the weighted score error that they minimise, written out as a definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from edgekv.convert.query_fit import Probe, fit_queries, rotate_rope_part, score_errors
from edgekv.convert.workers import workers
from edgekv.spec import MLA, RopeSpec

H, K, R, P, T = 2, 6, 5, 4, 70
MLA_SPEC = MLA(H, R, 3, K, RopeSpec(100.0, P))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True), np.float32)


@pytest.fixture
def probes() -> list[Probe]:
    """Two windows whose scores no reading of the rows can give exactly."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(2):
        rows = rotate_rope_part(rng.standard_normal((T, 1, R + P)).astype(np.float32), MLA_SPEC, +1)[:, 0]
        scores = rng.standard_normal((H, T, T)).astype(np.float32)
        attention = softmax(np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf))
        out.append(Probe(rng.standard_normal((T, H, K)).astype(np.float32), rows, scores, attention))
    return out


def fitted(start: np.ndarray, probes: list[Probe], steps: int, held_out: Sequence[Probe] = ()) -> np.ndarray:
    with workers() as crew:
        return fit_queries(start, probes, list(held_out), MLA_SPEC, steps, crew)


def errors(maps: np.ndarray, probes: list[Probe]) -> np.ndarray:
    """(H,) sum_t sum_s p_ts (d_ts - mean_p d_t)^2, in float64, by loops."""
    total = np.zeros(H)
    for probe in probes:
        for h in range(H):
            for t in range(T):
                read = maps[h].astype(np.float64) @ probe.queries[t, h]
                full = np.zeros((t + 1, 1, R + P), np.float32)
                full[t] = read
                query = rotate_rope_part(full, MLA_SPEC, +1)[t, 0]
                d = probe.rows[: t + 1] @ query - probe.scores[h, t, : t + 1]
                p = probe.attention[h, t, : t + 1]
                total[h] += p @ (d - p @ d) ** 2
    return total


def test_each_step_lowers_the_error_and_many_reach_the_minimum(probes: list[Probe]) -> None:
    start = np.zeros((H, R + P, K), np.float32)
    found = [errors(fitted(start, probes, n), probes) for n in (0, 1, 2, 4, 30)]
    for before, after in itertools.pairwise(found):
        assert (after <= before + 1e-6).all()
    assert (found[1] < 0.99 * found[0]).all()
    solution = fitted(start, probes, 30)
    rng = np.random.default_rng(1)
    for size in (0.01, 0.1):
        other = solution + (size * rng.standard_normal(solution.shape)).astype(np.float32)
        assert (errors(other, probes) > found[-1] * 0.9999).all(), "a minimum but for the damping"


def test_a_perfect_reading_is_found_and_stays(probes: list[Probe]) -> None:
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((H, R + P, K)).astype(np.float32)
    exact = []
    for probe in probes:
        queries = np.einsum("hij,thj->thi", truth, probe.queries)
        scores = np.einsum("thi,si->hts", rotate_rope_part(queries, MLA_SPEC, +1), probe.rows)
        exact.append(Probe(probe.queries, probe.rows, scores.astype(np.float32), probe.attention))
    np.testing.assert_allclose(fitted(truth, exact, 3), truth, atol=1e-3)
    start = np.zeros_like(truth)
    assert (errors(fitted(start, exact, 40), exact) < 1e-3 * errors(start, exact)).all()


@pytest.mark.parametrize("length", [2, 40, 63])
def test_windows_shorter_than_the_curvatures_stride_are_fitted(probes: list[Probe], length: int) -> None:
    seen = slice(length)
    short = [
        Probe(p.queries[seen], p.rows[seen], p.scores[:, seen, seen], p.attention[:, seen, seen])
        for p in probes
    ]
    start = np.zeros((H, R + P, K), np.float32)
    with workers() as crew:
        before = score_errors(start, short, MLA_SPEC, crew)
        after = score_errors(fitted(start, short, 4), short, MLA_SPEC, crew)
    assert (after < before).all()


def test_the_held_out_error_is_the_definitions(probes: list[Probe]) -> None:
    maps = np.random.default_rng(3).standard_normal((H, R + P, K)).astype(np.float32)
    with workers() as crew:
        found = score_errors(maps, probes, MLA_SPEC, crew)
    np.testing.assert_allclose(found, errors(maps, probes), rtol=1e-4)


def test_a_head_stops_where_the_held_out_windows_tell_it_to(probes: list[Probe]) -> None:
    """Fitted to scores of noise, no step helps on other windows: the start stays; and never is it left for worse."""
    rng = np.random.default_rng(4)
    truth = rng.standard_normal((H, R + P, K)).astype(np.float32)

    def reading(probe: Probe, noise: float) -> Probe:
        queries = np.einsum("hij,thj->thi", truth, probe.queries)
        scores = np.einsum("thi,si->hts", rotate_rope_part(queries, MLA_SPEC, +1), probe.rows)
        scores = (scores + noise * rng.standard_normal(scores.shape)).astype(np.float32)
        return Probe(probe.queries, probe.rows, scores, probe.attention)

    noisy, held_out = [reading(probes[0], 30.0)], [reading(probes[1], 0.0)]
    np.testing.assert_array_equal(fitted(truth, noisy, 5, held_out), truth)
    start = truth + rng.standard_normal(truth.shape).astype(np.float32)
    assert (errors(fitted(start, noisy, 5, held_out), held_out) <= errors(start, held_out)).all()


def test_rows_that_share_much_more_than_they_differ_by_are_fitted(probes: list[Probe]) -> None:
    """As keys with large biases: softmax sees the differences alone, float32 sees both."""
    shared = np.full(R + P, 1e4, np.float32)
    shared[R:] = 0  # what is rotated is not shared
    moved = [Probe(probe.queries, probe.rows + shared, probe.scores, probe.attention) for probe in probes]
    start = np.zeros((H, R + P, K), np.float32)
    with np.errstate(all="raise"):
        found = fitted(start, moved, 10, moved)
    assert (errors(found, moved) < 0.99 * errors(start, moved)).all()
