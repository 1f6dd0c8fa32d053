"""Balance of cached rows: the same model, with rows that one 8-bit scale suits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgekv.reference.model import ReferenceModel, load_block
from edgekv.rewrite.int8_rows import RowBalance, channel_factors
from edgekv.source import LazySource, TensorSource
from edgekv.spec import MLA, RopeSpec

TOKENS = np.random.default_rng(3).integers(0, 250, 60).tolist()


def logits(source: TensorSource) -> np.ndarray:
    model = ReferenceModel(source)
    return model.logits(model.hidden(TOKENS, model.new_cache(len(TOKENS))))


def rms(source: TensorSource) -> np.ndarray:
    """Size of each channel of the rows that each layer caches, (n_layers, W)."""
    model = ReferenceModel(source)
    cache = model.new_cache(len(TOKENS))
    model.hidden(TOKENS, cache)
    return np.stack([np.sqrt(np.square(rows[0]).mean(axis=0)) for rows in cache._k])


def test_the_model_is_the_same_and_its_rows_are_even(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource]
) -> None:
    source = make_mla(make_llama(), 32, 32)
    balanced = LazySource(source.spec, source.metadata)
    for name in source.names():
        balanced.borrow(source, name)
    balance = RowBalance(source)
    for layer in range(source.spec.n_layers):
        weights = load_block(source, layer)
        balance.apply(weights, layer)
        for name, array in weights.items():
            balanced.add_array(f"blk.{layer}.{name}", array)
    before, after = logits(source), logits(balanced)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    assert (np.log(rms(balanced)).std(axis=1) < 0.8 * np.log(rms(source)).std(axis=1)).all()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_factors_are_square_roots_and_both_parts_become_equally_large(layout: str) -> None:
    mla = MLA(2, 24, 8, 8, RopeSpec(1e4, 16, layout))  # type: ignore[arg-type]
    sizes = np.random.default_rng(0).uniform(0.1, 30, mla.cache_values).astype(np.float32)
    factors = channel_factors(sizes, mla)
    latent, rope = factors[:24], factors[24:]
    np.testing.assert_allclose(latent / latent[0], np.sqrt(sizes[:24] / sizes[0]), rtol=1e-5)
    pairs = rope.reshape(8, 2) if layout == "interleaved" else rope.reshape(2, 8).T
    assert np.array_equal(pairs[:, 0], pairs[:, 1]), "rotation mixes the two dims of a pair"
    for part, size in ((latent, sizes[:24]), (rope, sizes[24:])):
        assert np.mean((size / part) ** 2) == pytest.approx(1, rel=0.2)
