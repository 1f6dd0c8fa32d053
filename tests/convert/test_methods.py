"""TransMLA's rotation and PCA, by what the paper promises of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgekv.convert.methods import LayerMaps, LayerStats
from edgekv.convert.target import target_spec
from edgekv.convert.transmla import transmla
from edgekv.reference.model import load_block
from edgekv.source import LazySource
from edgekv.spec import GQA


def converted(source: LazySource, rank: int, rope_dim: int) -> tuple[LayerMaps, dict[str, np.ndarray], GQA]:
    attention = source.spec.layers[0].attention
    assert isinstance(attention, GQA)
    x = np.random.default_rng(3).standard_normal((300, source.spec.dim))
    covariance = x.T @ x / len(x)
    weights = load_block(source, 0)
    target = target_spec(attention, rank, rope_dim, min(16, rank), attention.head_dim)
    return transmla(weights, LayerStats(covariance, covariance, 1.0), attention, target), weights, attention


def test_at_full_rank_scores_without_rope_and_values_are_exact(make_llama: Callable[..., LazySource]) -> None:
    """At distance 0 nothing turns: an orthonormal rotation leaves q.k as it was, whatever the rope key took."""
    maps, w, gqa = converted(make_llama(), 96, 32)
    x, y = np.random.default_rng(4).standard_normal((2, 64))
    rows = np.concatenate([maps.latent @ y, maps.rope_key @ y])
    for h in range(gqa.n_heads):
        g = h // (gqa.n_heads // gqa.n_kv_heads)
        head, kv = slice(h * 32, h * 32 + 32), slice(g * 32, g * 32 + 32)
        query = w["attn_q.weight"][head] @ x
        score = query @ (w["attn_k.weight"][kv] @ y) / np.sqrt(32)
        assert (maps.query_map[h] @ query) @ rows == pytest.approx(score, rel=1e-3, abs=1e-3)
        np.testing.assert_allclose(maps.value[h] @ (maps.latent @ y), w["attn_v.weight"][kv] @ y, atol=1e-3)
    assert maps.latent_kept == pytest.approx(1)


def test_the_rope_head_has_more_than_its_share(make_llama: Callable[..., LazySource]) -> None:
    maps, _, gqa = converted(make_llama(), 64, 32)
    assert 1 / gqa.n_kv_heads < maps.rope_kept < 1


@pytest.mark.parametrize("rank", [1, 37, 128])
def test_shapes_at_any_rank(make_llama: Callable[..., LazySource], rank: int) -> None:
    maps, _, _ = converted(make_llama(), rank, 16)
    assert maps.latent.shape == (rank, 64)
    assert maps.rope_key.shape == (16, 64)
    assert maps.query_map.shape == (4, rank + 16, 32)
    assert maps.value.shape == (4, 32, rank)
