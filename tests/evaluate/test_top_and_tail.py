"""The compact distributions against exact KL divergences in float64."""

import numpy as np
import pytest

from edgekv.evaluate.top_and_tail import MIN_TAIL, SAMPLES, TOP, compact, kl_divergence, log_q_of, log_sum_exp
from edgekv.reference.ops import log_softmax
from edgekv.source import Array

VOCAB = 5000


def exact_log_softmax(logits: Array) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def exact_kl(p_logits: Array, q_logits: Array) -> np.ndarray:
    p, q = exact_log_softmax(p_logits), exact_log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def heavy_tailed(n: int, seed: int) -> Array:
    """Logits as a small model's: most probability in a few tokens, up to a third of it far down."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, VOCAB)) * rng.uniform(1, 4, (n, 1))).astype(np.float32)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.01, 1e-6), (0.1, 3e-5), (0.5, 1e-3)])
def test_kl_is_the_exact_one_but_for_little(noise: float, tolerance: float) -> None:
    """400 rows; the error of the mean shrinks with their root, so 150,000 rows are 20 times better."""
    p = heavy_tailed(400, 1)
    q = p + noise * np.random.default_rng(2).standard_normal(p.shape).astype(np.float32)
    rows = compact(p, np.zeros(400, np.int64), np.random.default_rng(3))
    assert rows.tail.mean() > 0.1  # the samples matter: the top alone would miss that much
    exact = exact_kl(p, q)
    sums, _ = log_sum_exp(q)
    found = kl_divergence(rows, log_q_of(rows, q, sums))
    assert abs(found.mean() - exact.mean()) < tolerance
    top_and_rest = exact.mean() - found.mean()
    assert abs(top_and_rest) < 0.02 * exact.mean()


def test_kl_is_unbiased() -> None:
    p = heavy_tailed(50, 4)
    q = p + 0.5 * np.random.default_rng(5).standard_normal(p.shape).astype(np.float32)
    sums, _ = log_sum_exp(q)
    means = []
    for seed in range(40):
        rows = compact(p, np.zeros(50, np.int64), np.random.default_rng(seed))
        means.append(kl_divergence(rows, log_q_of(rows, q, sums)).mean())
    error = np.mean(means) - exact_kl(p, q).mean()
    assert abs(error) < 4 * np.std(means) / len(means) ** 0.5


def test_kl_of_a_model_with_itself_is_nothing() -> None:
    p = heavy_tailed(20, 6)
    rows = compact(p, np.zeros(20, np.int64), np.random.default_rng(0))
    sums, _ = log_sum_exp(p)
    assert np.abs(kl_divergence(rows, log_q_of(rows, p, sums))).max() < 1e-6


def test_a_vocabulary_smaller_than_the_top_is_exact() -> None:
    rng = np.random.default_rng(7)
    p, q = rng.standard_normal((2, 9, 100)).astype(np.float32)
    rows = compact(p, np.zeros(9, np.int64), rng)
    assert rows.ids.shape == (9, 100 + SAMPLES)
    assert not rows.tail.any()
    np.testing.assert_allclose(
        kl_divergence(rows, log_q_of(rows, q, log_sum_exp(q)[0])), exact_kl(p, q), atol=1e-6
    )


def test_rows_without_a_tail_cost_nothing_but_rounding() -> None:
    p = np.full((3, VOCAB), -30, np.float32)
    p[:, :TOP] = np.linspace(8, 0, TOP)
    q = p + np.random.default_rng(0).standard_normal(p.shape).astype(np.float32)
    rows = compact(p, np.zeros(3, np.int64), np.random.default_rng(0))
    assert not rows.tail.any()
    np.testing.assert_allclose(
        kl_divergence(rows, log_q_of(rows, q, log_sum_exp(q)[0])), exact_kl(p, q), atol=2 * MIN_TAIL
    )


def test_what_is_kept_of_a_row() -> None:
    logits = heavy_tailed(5, 8)
    before = logits.copy()
    targets = np.array([3, 1, 4, 1, 5])
    rows = compact(logits, targets, np.random.default_rng(1))
    np.testing.assert_array_equal(logits, before)
    expected = log_softmax(logits)
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(rows.ids[:, :TOP], order[:, :TOP])
    np.testing.assert_array_equal(rows.argmax, logits.argmax(axis=-1))
    np.testing.assert_allclose(rows.log_p, np.take_along_axis(expected, rows.ids, axis=-1), atol=2e-6)
    np.testing.assert_allclose(rows.nll, -expected[np.arange(5), targets], atol=2e-6)
    tail = np.take_along_axis(np.exp(expected), order[:, TOP:], axis=-1).sum(axis=-1)
    np.testing.assert_allclose(rows.tail, tail, rtol=1e-4)
    for i in range(5):
        assert not set(rows.ids[i, :TOP]) & set(rows.ids[i, TOP:])


def test_log_sum_exp_of_large_logits() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [-500.0, -501.0, -502.0]], np.float32)
    sums, best = log_sum_exp(logits)
    np.testing.assert_allclose(sums, [1e4 + np.log(2), -500 + np.log(1 + np.exp(-1) + np.exp(-2))], rtol=1e-7)
    assert best.tolist() == [0, 0]
