"""Whole conversions of small models: exact where they can be, better where they promise it, sound in llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.reference import ReferenceBackend
from edgekv.convert.layers import METHODS, LayerLoss, convert, convertible_attention
from edgekv.convert.statistics import FitRecipe
from edgekv.convert.target import target_spec
from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.evaluate.verify import compare
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.source import LazySource, TensorSource
from edgekv.spec import GQA, LayerSpec, RopeSpec

RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(0, 256, (4, 128))
MANY = np.random.default_rng(1).integers(0, 256, (24, 128))
TOKENS = RNG.integers(0, 256, 100).tolist()


def kl(a: TensorSource, b: TensorSource) -> float:
    return compare(ReferenceBackend(a, 128), ReferenceBackend(b, 128), TOKENS, lambda *_: None).kl


def converted(
    source: TensorSource,
    sizes: tuple[int, int, int],
    folder: Path,
    recipe: FitRecipe,
    windows: np.ndarray = WINDOWS,
) -> tuple[TensorSource, list[LayerLoss]]:
    """sizes: rank, rope dim, nope dim."""
    gqa = convertible_attention(source.spec)
    losses: list[LayerLoss] = []
    out = convert(source, target_spec(gqa, *sizes, gqa.head_dim), windows, folder, recipe, losses.append)
    assert [loss.layer for loss in losses] == list(range(source.spec.n_layers))
    return out, losses


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [32, 64])
def test_one_kv_head_at_full_rank_is_reproduced(
    make_llama: Callable[..., LazySource], tmp_path: Path, tied: bool, rank: int
) -> None:
    """The rope key holds all of the key, the latent all of the value: nothing is lost but the norm trick's share."""
    source = make_llama(n_kv_heads=1, tied=tied)
    plain = FitRecipe(query_iterations=0, refit_output=False)
    for name, recipe in {"plain": plain, "refitted": METHODS["edgekv"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        out, losses = converted(source, (rank, 32, 16), folder, recipe)
        assert max(loss.output_error for loss in losses) < 1e-4
        assert min(min(loss.rope_kept, loss.latent_kept) for loss in losses) > 0.9999
        assert kl(source, out) < 1e-3
        assert out.spec.tied_embeddings == tied


def test_more_rank_and_more_rope_lose_less(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source = make_llama()
    for name, curve in {"rank": [(8, 32), (24, 32), (64, 32)], "rope": [(32, 4), (32, 16), (32, 32)]}.items():
        errors = []
        for rank, rope_dim in curve:
            folder = tmp_path / f"{name}-{rank}-{rope_dim}"
            folder.mkdir()
            _, losses = converted(source, (rank, rope_dim, 8), folder, METHODS["edgekv"])
            errors.append(float(np.mean([loss.output_error for loss in losses])))
        assert errors == sorted(errors, reverse=True), name
        assert errors[-1] < 0.8 * errors[0]


def test_every_refit_lowers_the_output_error(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    found = []
    for i, (queries, outputs) in enumerate([(0, False), (4, False), (4, True)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        recipe = FitRecipe(query_iterations=queries, refit_output=outputs, sequential=False)
        _, losses = converted(make_llama(), (32, 16, 16), folder, recipe, MANY)
        found.append([loss.output_error for loss in losses])
    plain, queries_refitted, all_refitted = np.array(found)
    assert (queries_refitted < plain).all(), found
    assert (all_refitted < 1.00001 * queries_refitted).all(), found  # held-out text may veto a layer's refit
    assert all_refitted.sum() < queries_refitted.sum(), found


def test_it_loses_less_than_transmla(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source = make_llama()
    losses = {}
    for method, recipe in METHODS.items():
        folder = tmp_path / method
        folder.mkdir()
        losses[method] = kl(source, converted(source, (64, 32, 16), folder, recipe)[0])
    assert losses["edgekv"] < losses["transmla"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(64, 32, 16), (37, 16, 11), (1, 2, 1), (5, 30, 3), (128, 32, 40)])
def test_llama_cpp_runs_what_comes_out(
    make_llama: Callable[..., LazySource], tmp_path: Path, method: str, sizes: tuple[int, int, int]
) -> None:
    """Any rank, odd ones and one past the model's width: written in F32, the engines agree."""
    out, _ = converted(make_llama(), sizes, tmp_path, METHODS[method])
    path = tmp_path / "out.gguf"
    write_gguf(out, path, "f32", {}, False, lambda *_: None)
    engine = LlamaCppBackend(path, n_ctx=128, cache_type="f32", n_threads=1)
    found = compare(ReferenceBackend(open_model(path), 128), engine, TOKENS, lambda *_: None)
    assert engine.cache_nbytes() == engine.n_ctx * out.spec.kv_bytes_per_token("f32")
    engine.close()
    assert found.kl <= 1e-5
    assert found.ppl_a < float("inf")


def test_what_is_not_attention_is_untouched(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_model(tiny_llama)
    out, _ = converted(source, (32, 32, 16), tmp_path, METHODS["transmla"])
    for name in source.names():
        if ".attn_" not in name or name.endswith("attn_norm.weight"):
            raw, original = out.raw(name), source.raw(name)
            assert raw is not None
            assert original is not None
            np.testing.assert_array_equal(raw, original)
    assert out.raw("blk.0.attn_q.weight") is None
    assert not [name for name in out.names() if "attn_k.weight" in name or "attn_v.weight" in name]
    assert out.metadata == source.metadata


def test_models_it_cannot_start_from(
    make_llama: Callable[..., LazySource], tiny_mla: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="already has MLA"):
        convertible_attention(open_model(tiny_mla).spec)
    spec = make_llama().spec
    for rope in (RopeSpec(10000.0, 16), RopeSpec(10000.0, 32, "half")):
        layer = LayerSpec(GQA(4, 2, 32, rope), 96)
        with pytest.raises(UnsupportedError, match=r"rotates|by halves"):
            convertible_attention(dataclasses.replace(spec, layers=(layer,)))
    source = make_llama()
    spoilt = source.load("blk.1.attn_v.weight").copy()
    spoilt[0, 0] = np.nan
    source.add_array("blk.1.attn_v.weight", spoilt)
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_v\.weight holds NaN"):
        convert(
            source, target_spec(convertible_attention(spec), 32, 32, 16, 32), WINDOWS, tmp_path, METHODS["edgekv"],
            lambda loss: None,
        )  # fmt: skip
