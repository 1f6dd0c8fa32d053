"""Cached rows out of an engine and into another one: the same bytes, the same logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.base import Backend
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.llama_cpp.library import llama, load_model
from edgekv.backends.llama_cpp.state import read_state, write_state
from edgekv.backends.open import open_backend
from edgekv.cache.rows import CacheRows, Plane
from edgekv.errors import InputError, UnsupportedError
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.open import open_model
from edgekv.progress import ignore
from edgekv.quant.formats import FORMATS

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 250, 60)]
Opener = Callable[[str], Backend]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folders of both tiny models, and the latent one with an 8-bit cache."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, model, cache in (
        ("gqa", tiny_llama, "f32"),
        ("mla", tiny_mla, "f32"),
        ("int8", tiny_mla, "int8"),
    ):
        write_onnx(open_model(model), folder / name, OnnxOptions("f32", cache), False, ignore)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def opened(tiny_llama: Path, tiny_mla: Path, folder: Path) -> Iterator[Opener]:
    """Opens an engine by a name such as "llama.cpp mla q4_0"."""
    backends: list[Backend] = []

    def open_it(name: str) -> Backend:
        kind, model, cache_type = name.split()
        path = tiny_mla if model == "mla" else tiny_llama
        if kind == "isolated":
            backends.append(IsolatedBackend(path, n_ctx=256, cache_type=cache_type, n_threads=1))
        elif kind == "onnx":
            backends.append(open_backend(folder / model, n_ctx=256, n_threads=1))
        else:
            threads = {"n_threads": 1} if kind == "llama.cpp" else {}
            backends.append(open_backend(path, kind, n_ctx=256, cache_type=cache_type, **threads))  # type: ignore[arg-type]
        return backends[-1]

    yield open_it
    for backend in backends:
        backend.close()


ENGINES = (
    *("llama.cpp gqa f16", "llama.cpp gqa q4_0", "llama.cpp mla q4_0", "llama.cpp mla f32"),
    "llama.cpp gqa q8_0/q4_0",
    *("reference gqa f32", "reference mla f32", "onnx gqa f32", "onnx mla f32", "onnx int8 -"),
    *("isolated mla q8_0", "isolated gqa f16"),
)


@pytest.mark.parametrize("name", ENGINES)
def test_a_loaded_cache_goes_on_as_the_saved_one(opened: Opener, name: str) -> None:
    engine = opened(name)
    layout = engine.layout()
    assert engine.n_past == 0
    engine.prefill(TOKENS[:50])
    saved = engine.save()
    assert (saved.layout, saved.n_tokens) == (layout, 50)
    expected = [engine.decode(token) for token in TOKENS[50:]]
    later = engine.save(50)
    other = opened(name)
    other.prefill([7, 8, 9])
    other.load(saved)
    assert other.n_past == 50
    for token, logits in zip(TOKENS[50:], expected, strict=True):
        np.testing.assert_array_equal(other.decode(token), logits)
    np.testing.assert_array_equal(other.save(50).data, later.data)
    np.testing.assert_array_equal(other.save().data, CacheRows.join(layout, [saved, later]).data)
    other.load(saved.part(0, 0))
    assert other.n_past == 0
    assert other.save().n_tokens == 0


@pytest.mark.parametrize("model", ["gqa", "mla"])
def test_engines_with_the_same_cache_type_take_each_others_rows(opened: Opener, model: str) -> None:
    engines = [opened(f"{kind} {model} f32") for kind in ("llama.cpp", "reference", "onnx")]
    expected = [engine.prefill_all(TOKENS)[-1] for engine in engines]
    for engine in engines:
        engine.trim(50)
        rows = engine.save()
        for other, logits in zip(engines, expected, strict=True):
            other.load(rows)
            assert np.abs(other.prefill(TOKENS[50:]) - logits).max() < 0.05  # logits span 20
            other.load(rows)


@pytest.mark.parametrize("cache_type", ["f16", "q4_0"])
def test_rows_take_the_bytes_of_the_arithmetic(opened: Opener, cache_type: str) -> None:
    assert [plane.nbytes for plane in opened(f"llama.cpp mla {cache_type}").layout()] == [
        FORMATS[cache_type].nbytes(64)
    ] * 3


def test_other_rows_are_refused_and_the_cache_stays(opened: Opener) -> None:
    engine = opened("isolated mla q8_0")
    engine.prefill(TOKENS)
    rows = engine.save()
    with pytest.raises(
        InputError, match=r"3 planes of q8_0 x 64, and this engine keeps 3 planes of f32 x 64; open"
    ):
        opened("reference mla f32").load(rows)
    with pytest.raises(InputError, match="do not fit a context of 256"):
        engine.load(CacheRows.join(rows.layout, [rows] * 5))
    with pytest.raises(InputError, match="60 cached rows cannot take 10 bytes"):
        engine.load(CacheRows(rows.layout, 60, rows.data[:10]))
    assert engine.n_past == 60
    np.testing.assert_array_equal(engine.save().data, rows.data)


def test_random_bytes_crash_no_engine(opened: Opener) -> None:
    random = np.random.default_rng(0)
    for name in ENGINES[:10]:
        engine = opened(name)
        rows = CacheRows.empty(engine.layout(), 100)
        rows.data[:] = random.integers(0, 256, len(rows.data))
        engine.load(rows)
        with np.errstate(all="ignore"):
            assert engine.decode(1).shape == (engine.n_vocab,)


def test_rotated_values_are_marked(smollm2: Path) -> None:
    """llama.cpp rotates heads of 64 dims before it rounds them; rows of a build that does not are others."""
    for cache_type, encoding in (("f16", ""), ("q8_0", "hadamard")):
        engine = open_backend(smollm2, n_ctx=256, cache_type=cache_type, n_threads=1)
        planes = [
            Plane(f"{i}.{kind}", cache_type, 192, encoding) for kind in ("key", "value") for i in range(30)
        ]
        assert engine.layout() == tuple(planes)
        engine.close()


def test_a_state_of_more_than_one_cache_is_refused(opened: Opener) -> None:
    engine = opened("llama.cpp mla q4_0")
    engine.prefill(TOKENS)
    assert isinstance(engine, LlamaCppBackend)
    state = write_state(engine._state_format(), engine.save())
    np.testing.assert_array_equal(state, engine._state(0))
    for other in (np.tile(state[8:], 2), state[:-1], np.append(state, np.zeros(4, np.uint8)), np.flip(state)):
        with pytest.raises(UnsupportedError, match="more of this model than one plain cache"):
            read_state(other, ("", ""))


def test_transposed_values(tiny_llama: Path) -> None:
    """Without flash attention llama.cpp keeps values token by token within each dim."""
    api = llama()
    model = load_model(tiny_llama, repack=False, mapped=True)
    states = {}
    for flash in (0, 1):
        params = api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch, params.flash_attn_type = 256, 1, 1, flash
        context = api.llama_init_from_model(model, params)
        ids = (ctypes.c_int32 * len(TOKENS))(*TOKENS)
        assert api.llama_decode(context, api.llama_batch_get_one(ids, len(TOKENS))) == 0
        state = np.empty(api.llama_state_seq_get_size(context, 0), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        assert api.llama_state_seq_get_data(context, pointer, len(state), 0) == len(state)
        form, rows = read_state(state, ("", ""))
        assert form.transposed is (flash == 0)
        np.testing.assert_array_equal(write_state(form, rows), state)
        states[flash] = rows
        api.llama_free(context)
    api.llama_model_free(model)
    assert states[0].layout == states[1].layout
    values = [np.concatenate(states[flash].planes()[3:]).view(np.float16) for flash in (0, 1)]
    np.testing.assert_allclose(values[0], values[1], atol=0.05)
