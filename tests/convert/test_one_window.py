"""One layer on one window, against PyTorch, the reference model and the definitions written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edgekv.cache.store import KVCache
from edgekv.convert.methods import LayerMaps
from edgekv.convert.one_window import (
    PROBE_TOKENS,
    attention_view,
    feed_forward,
    gqa_mixed,
    mixed_latents,
    probe,
    query_rows,
)
from edgekv.reference.attention import gqa_attention
from edgekv.reference.model import block_forward, load_block
from edgekv.reference.ops import apply_rope, rms_norm
from edgekv.source import LazySource
from edgekv.spec import GQA, MLA, RopeSpec

T = PROBE_TOKENS + 40
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., LazySource]) -> LazySource:
    return make_llama()


@pytest.fixture(scope="module")
def gqa(source: LazySource) -> GQA:
    attention = source.spec.layers[0].attention
    assert isinstance(attention, GQA)
    return attention


@pytest.fixture(scope="module")
def w(source: LazySource) -> dict[str, np.ndarray]:
    return load_block(source, 0)


@pytest.fixture(scope="module")
def maps() -> LayerMaps:
    """Random maps to rank 24 and 8 rope dims for 4 heads of 32."""
    curve: dict[int, float] = {}
    return LayerMaps(normal(24, 64), normal(8, 64), normal(4, 32, 32) / 8, normal(4, 32, 24), 0, 0, curve)


TARGET = MLA(4, 24, 10, 32, RopeSpec(50.0, 8))


def rotated_keys(x: np.ndarray, w: dict[str, np.ndarray], gqa: GQA) -> np.ndarray:
    """Keys of each query head, (H, T, K)."""
    keys = (x @ w["attn_k.weight"].T).reshape(len(x), gqa.n_kv_heads, -1)
    return np.repeat(
        apply_rope(keys, np.arange(len(x)), gqa.rope), gqa.n_heads // gqa.n_kv_heads, axis=1
    ).swapaxes(0, 1)


def test_the_originals_mix_is_the_reference_models(
    source: LazySource, w: dict[str, np.ndarray], gqa: GQA
) -> None:
    x = normal(T, 64)
    queries, mixed = gqa_mixed(x, w, gqa)
    np.testing.assert_allclose(queries.reshape(T, -1), x @ w["attn_q.weight"].T, atol=1e-5)
    expected = gqa_attention(x, w, gqa, KVCache(source.spec, T), 0)
    np.testing.assert_allclose(mixed @ w["attn_output.weight"].T, expected, atol=1e-4)


def test_the_view_is_the_causal_softmax_of_the_first_tokens(w: dict[str, np.ndarray], gqa: GQA) -> None:
    x = normal(T, 64)
    view = attention_view(x, w, gqa)
    queries, _ = gqa_mixed(x, w, gqa)
    rotated = apply_rope(queries, np.arange(T), gqa.rope).swapaxes(0, 1)
    scores = (rotated @ rotated_keys(x, w, gqa).swapaxes(1, 2) / np.sqrt(32))[:, :PROBE_TOKENS, :PROBE_TOKENS]
    np.testing.assert_allclose(view.scores, scores, atol=1e-4)
    masked = torch.from_numpy(scores).masked_fill(
        ~torch.ones(2 * [PROBE_TOKENS], dtype=torch.bool).tril(), -np.inf
    )
    np.testing.assert_allclose(view.attention, masked.softmax(-1).numpy(), atol=1e-5)
    assert attention_view(x[:5], w, gqa).scores.shape == (4, 5, 5)


def test_a_probe_holds_the_rows_that_the_converted_layer_caches(
    w: dict[str, np.ndarray], gqa: GQA, maps: LayerMaps
) -> None:
    x = normal(T, 64)
    queries, _ = gqa_mixed(x, w, gqa)
    view = attention_view(x, w, gqa)
    found = probe(x, queries, maps, view, TARGET)
    rope_key = apply_rope((x @ maps.rope_key.T)[:, None], np.arange(T), TARGET.rope)[:, 0]
    rows = np.concatenate([x @ maps.latent.T, rope_key], axis=1)
    np.testing.assert_allclose(found.rows, rows[:PROBE_TOKENS], atol=1e-4)
    np.testing.assert_array_equal(found.queries, queries[:PROBE_TOKENS])
    assert found.scores is view.scores


def test_mixed_latents_are_attention_over_the_cached_rows(maps: LayerMaps) -> None:
    """Against loops over heads and tokens in float64."""
    x, queries, query_map = normal(9, 64), normal(9, 4, 32), normal(4, 32, 32) / 8
    found = mixed_latents(x, queries, query_map, maps, TARGET).reshape(9, 4, 24)
    latents = x @ maps.latent.T
    rope_key = apply_rope((x @ maps.rope_key.T)[:, None], np.arange(9), TARGET.rope)[:, 0]
    for h in range(4):
        read = queries[:, h] @ query_map[h].T  # (T, R + P)
        turned = apply_rope(read[:, None, 24:].copy(), np.arange(9), TARGET.rope)[:, 0]
        for t in range(9):
            scores = latents[: t + 1] @ read[t, :24] + rope_key[: t + 1] @ turned[t]
            p = np.exp(scores.astype(np.float64) - scores.max())
            np.testing.assert_allclose(found[t, h], p @ latents[: t + 1] / p.sum(), atol=1e-3)


def test_query_rows_of_full_width_are_the_query_map_itself() -> None:
    """k_b @ its rows, and the rope rows, applied to inputs: what the map makes of the head's query."""
    query_map, w_q, x = normal(4, 32, 32), normal(4, 32, 64), normal(20, 64)
    full = MLA(4, 24, 24, 32, TARGET.rope)
    found = query_rows(query_map, w_q, np.eye(64), full)
    assert (found.rows.shape, found.k_b.shape) == ((4, 32, 64), (4, 24, 24))
    np.testing.assert_allclose(found.query_map, query_map, atol=1e-4)
    for h in range(4):
        given = x @ found.rows[h].T
        read = np.concatenate([given[:, :24] @ found.k_b[h].T, given[:, 24:]], axis=1)
        np.testing.assert_allclose(read, x @ w_q[h].T @ query_map[h].T, atol=2e-2)


def test_narrower_query_rows_keep_the_best_of_the_map() -> None:
    """Rank N of the latent part, under the covariance of the queries: no other map of that rank is closer."""
    query_map, w_q = normal(4, 32, 32), normal(4, 32, 64)
    inputs = normal(500, 64) * np.logspace(0, -2, 64, dtype=np.float32)
    covariance = (inputs.T @ inputs / 500).astype(np.float64)
    found = query_rows(query_map, w_q, covariance, TARGET)
    np.testing.assert_array_equal(found.query_map[:, 24:], query_map[:, 24:])
    for h in range(4):
        queries = inputs @ w_q[h].T
        exact = queries @ query_map[h, :24].T
        error = np.square(exact - queries @ found.query_map[h, :24].T).sum()
        best = np.square(np.linalg.svd(exact, compute_uv=False)[10:]).sum()  # Eckart-Young on the outputs
        assert error == pytest.approx(best, rel=1e-2)


def test_the_feed_forward_is_the_reference_blocks(
    source: LazySource, w: dict[str, np.ndarray], gqa: GQA
) -> None:
    x = normal(12, 64)
    attended = gqa_attention(
        rms_norm(x, w["attn_norm.weight"], source.spec.norm_eps), w, gqa, KVCache(source.spec, 12), 0
    )
    expected = block_forward(x, w, source.spec, 0, KVCache(source.spec, 12))
    np.testing.assert_allclose(feed_forward(x + attended, w, source.spec.norm_eps), expected, atol=1e-4)
