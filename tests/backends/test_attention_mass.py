"""The attention that cached rows get, from llama.cpp with the kernel, beside the NumPy reference's softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.backends.evicting import EvictingBackend
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.kernel_names import KERNEL_VARIABLE
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.open import open_backend
from edgekv.cache.policies.settings import Eviction
from edgekv.errors import UnsupportedError
from edgekv.reference import attention

pytestmark = pytest.mark.usefixtures("kernel_unloaded")
TOKENS = np.random.default_rng(0).integers(0, 250, 330).tolist()
ROUNDING = 0.03  # of factors in bfloat16, where the CPU multiplies them
FILLED = 290  # before anything is collected; the rest is prefilled up to 325 and then decoded


@pytest.fixture
def kernel(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parents[2]))
    monkeypatch.setenv(KERNEL_VARIABLE, "edgekv")


def run(engine: Any) -> Any:
    """Mass behind the prefill, and behind the tokens decoded after it."""
    engine.prefill(TOKENS[:FILLED])
    engine.collect_attention(True)
    engine.prefill(TOKENS[FILLED:325])
    prefilled = engine.attention_mass()
    for token in TOKENS[325:]:
        engine.decode(token)
    return prefilled, engine.attention_mass()


def reference_mass(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same of the reference: what `attend` is called with, as weights in float64."""
    layers: list[np.ndarray] = []

    def mass(q: Any, k: Any, scale: float) -> np.ndarray:
        keys = np.repeat(k.astype(np.float64), q.shape[1] // len(k), axis=0)
        scores = np.einsum("thk,hsk->hts", q.astype(np.float64), keys) * scale
        position = k.shape[1] - len(q) + np.arange(len(q))
        scores[:, np.arange(k.shape[1]) > position[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray((weights / weights.sum(-1, keepdims=True)).sum((0, 1)))

    plain = attention.attend

    def attend(q: Any, k: Any, v: Any, scale: float, *rest: Any) -> Any:
        layers.append(mass(q, k, scale))
        return plain(q, k, v, scale, *rest)

    monkeypatch.setattr(attention, "attend", attend)
    engine = open_backend(path, "reference", n_ctx=512)
    engine.prefill(TOKENS[:FILLED])
    n_layers = len(layers)
    layers.clear()
    engine.prefill(TOKENS[FILLED:325])
    prefilled = np.stack(layers)
    total = np.pad(prefilled, ((0, 0), (0, 5)))
    for token in TOKENS[325:]:
        layers.clear()
        engine.decode(token)
        total[:, : engine.n_past] += np.stack(layers[:n_layers])
    return prefilled, total


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_as_the_reference_attends(
    kernel: None, model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(model)
    engine = open_backend(path, "llama.cpp", n_ctx=512, cache_type="f32", n_threads=2)
    found = run(engine)
    for mass, wanted, n_queries in zip(found, reference_mass(path, monkeypatch), (35, 40), strict=True):
        assert mass.dtype == np.float32
        np.testing.assert_allclose(mass, wanted, rtol=ROUNDING, atol=1e-4)
        np.testing.assert_allclose(mass.sum(axis=1), 4 * n_queries, rtol=1e-5)
    engine.trim(310)
    np.testing.assert_array_equal(engine.attention_mass(), found[1][:, :310])
    engine.collect_attention(True)
    engine.prefill(TOKENS[310:])
    assert np.all(engine.attention_mass()[:, 310:].sum(axis=1) < 4 * 20), "counted from nothing again"
    engine.close()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_h2o_sees_what_the_reference_sees(kernel: None, model: str, request: pytest.FixtureRequest) -> None:
    """By position, where cells of evicted rows are used again; both keep the same rows, and again choose alike."""
    path = request.getfixturevalue(model)
    settings = Eviction("h2o", budget=200)
    reference = open_backend(path, "reference", n_ctx=500, eviction=settings)
    engine = open_backend(path, "llama.cpp", n_ctx=500, cache_type="f32", n_threads=1, eviction=settings)
    assert isinstance(reference, EvictingBackend)
    assert isinstance(engine, EvictingBackend)
    kept = np.append(np.sort(np.random.default_rng(1).choice(149, 89, replace=False)), 149)
    for start, stop in ((0, 150), (150, 230)):
        for backend in (reference, engine):
            backend.prefill(TOKENS[start:stop])
        both = list(zip(reference.backend.views(), engine.backend.views(), strict=True))
        for theirs, ours in both:
            assert theirs.attention is not None
            assert ours.attention is not None
            wanted = theirs.attention.mean(axis=0)
            np.testing.assert_allclose(ours.attention[0], wanted, rtol=ROUNDING, atol=2e-5)
        if not start:
            reference.backend.keep([np.broadcast_to(kept, (view.n_heads, 90)) for view, _ in both])
            engine.backend.keep([kept])
    engine.trim(200)
    assert isinstance(engine.backend, LlamaCppBackend)
    assert engine.backend.attention_mass().shape == (3, 140)
    engine.close()


def test_from_a_child(kernel: None, tiny_mla: Path) -> None:
    engine = IsolatedBackend(tiny_mla, "llama.cpp", n_ctx=512, cache_type="q4_0", n_threads=1)
    prefilled, total = run(engine)
    assert (prefilled.shape, total.shape) == ((3, 325), (3, 330))
    np.testing.assert_allclose(total.sum(axis=1), 4 * 40, rtol=1e-5)
    engine.collect_attention(False)
    engine.close()


def test_what_cannot_tell_says_so(tiny_llama: Path) -> None:
    for kind in ("llama.cpp", "reference"):
        engine = open_backend(tiny_llama, kind, n_ctx=64)
        with pytest.raises(UnsupportedError, match="with EdgeKV's kernel"):
            engine.collect_attention(True)
        engine.close()


def test_layers_with_a_window_do_not(kernel: None, tiny_gemma: Path) -> None:
    engine = open_backend(tiny_gemma, "llama.cpp", n_ctx=64)
    with pytest.raises(UnsupportedError, match="let go of tokens"):
        engine.collect_attention(True)
    engine.close()
