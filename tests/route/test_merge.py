"""The merge of partial attentions against attention over all rows at once."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from edgekv.reference.attention import attend
from edgekv.route.merge import merged, partial_attention
from edgekv.source import Array

HEADS, RANK, ROPE = 16, 64, 16
SCALE = 0.1


def split(rows: Array, cuts: list[int]) -> list[Array]:
    return np.split(rows, cuts)


@pytest.mark.parametrize("cuts", [[1], [512], [1000], [100, 400, 999], [0, 0, 700], [1024]])
@pytest.mark.parametrize(("kind", "sharpness"), [(np.float32, 1.0), (np.float64, 8.0)])
def test_the_merge_is_unsplit_attention(cuts: list[int], kind: type, sharpness: float) -> None:
    rng = np.random.default_rng(len(cuts))
    queries = (sharpness * rng.standard_normal((3, HEADS, RANK + ROPE))).astype(kind)
    rows = rng.standard_normal((1024, RANK + ROPE)).astype(kind)
    whole = partial_attention(queries, rows, rows[:, :RANK], SCALE).attended
    parts = [partial_attention(queries, part, part[:, :RANK], SCALE) for part in split(rows, cuts)]
    np.testing.assert_allclose(merged(parts).attended, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged(reversed(parts)).attended, whole, rtol=0, atol=1e-6)
    pairwise = functools.reduce(lambda one, two: merged([one, two]), reversed(parts))
    np.testing.assert_allclose(pairwise.attended, whole, rtol=0, atol=1e-6)


def test_unsplit_attention_is_the_reference_models() -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, HEADS, RANK)).astype(np.float32)
    rows = rng.standard_normal((300, RANK)).astype(np.float32)
    expected = attend(query, rows[None], rows[None], SCALE)
    parts = [partial_attention(query, part, part, SCALE) for part in split(rows, [7, 250])]
    np.testing.assert_allclose(merged(parts).attended, expected, rtol=0, atol=1e-6)


def test_scores_that_would_overflow() -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((HEADS, RANK)).astype(np.float32) * 1e3
    rows = rng.standard_normal((64, RANK)).astype(np.float32) * 1e2
    whole = partial_attention(queries, rows, rows, 1.0).attended
    parts = [partial_attention(queries, part, part, 1.0) for part in split(rows, [13, 40])]
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(merged(parts).attended, whole, rtol=1e-6, atol=0)
