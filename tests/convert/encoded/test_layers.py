"""Whole conversions to encoded latents: sizes as asked for, the split that loses least, what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.reference import ReferenceBackend
from edgekv.convert.encoded.layers import EncodedTarget, convert_encoded
from edgekv.convert.layers import METHODS, LayerLoss, convert, convertible_attention
from edgekv.convert.target import target_spec
from edgekv.errors import UnsupportedError
from edgekv.evaluate.verify import compare
from edgekv.models.open import open_model
from edgekv.source import LazySource, TensorSource
from edgekv.spec import MLA

WINDOWS = np.random.default_rng(1).integers(0, 256, (12, 96))
TOKENS = np.random.default_rng(2).integers(0, 256, 100).tolist()


def encoded(
    source: TensorSource, width: int, rope_dim: int | None, folder: Path
) -> tuple[TensorSource, list[LayerLoss]]:
    losses: list[LayerLoss] = []
    folder.mkdir()
    target = EncodedTarget((width,) * source.spec.n_layers, rope_dim)
    return convert_encoded(source, target, WINDOWS, folder, losses.append), losses


def kl(a: TensorSource, b: TensorSource) -> float:
    return compare(ReferenceBackend(a, 128), ReferenceBackend(b, 128), TOKENS, lambda *_: None).kl


@pytest.mark.parametrize(("width", "rope_dim"), [(96, 64), (64, 32), (48, None), (7, 2), (1, None)])
def test_rows_are_as_wide_as_asked(
    make_llama: Callable[..., LazySource], tmp_path: Path, width: int, rope_dim: int | None
) -> None:
    source = make_llama(bias=True, qk_norm=True)
    out, losses = encoded(source, width, rope_dim, tmp_path / "out")
    for layer, loss in zip(out.spec.layers, losses, strict=True):
        assert isinstance(layer.attention, MLA)
        assert layer.attention.cache_values == width
        assert layer.attention.rope.dim == loss.rope_dim
        assert rope_dim is None or loss.rope_dim == rope_dim
        assert all(0 <= share <= 1 for share in (loss.rope_kept, loss.latent_kept))
    assert np.isfinite(kl(source, out))


def test_the_split_is_better_than_most(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source = make_llama()
    fixed = {p: kl(source, encoded(source, 80, p, tmp_path / str(p))[0]) for p in (8, 16, 32, 48, 64)}
    chosen = kl(source, encoded(source, 80, None, tmp_path / "chosen")[0])
    assert chosen < np.median(list(fixed.values()))


def test_several_components_lose_less_than_one(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    """At the same width: the graph of llama.cpp has one component per frequency for all heads."""
    source = make_llama()
    target = target_spec(convertible_attention(source.spec), 64, 32, 32, 32)
    (tmp_path / "one").mkdir()
    one = convert(source, target, WINDOWS, tmp_path / "one", METHODS["edgekv"], lambda _: None)
    several, _ = encoded(source, 96, None, tmp_path / "several")
    assert kl(source, several) < kl(source, one)


def test_what_makes_queries_keys_and_values_stays_as_stored(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_model(tiny_llama)
    out, _ = encoded(source, 64, None, tmp_path / "out")
    for name in source.names():
        if not name.endswith("attn_output.weight"):
            np.testing.assert_array_equal(out.raw(name), source.raw(name))


def test_a_latent_is_not_encoded_again(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already has MLA"):
        encoded(open_model(tiny_mla), 32, None, tmp_path / "out")
