"""Calibration text that a conversion makes for itself: who writes it, how much at once, what it is mixed with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.progress import silent
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.source import LazySource
from edgekv.workflows import calibration
from edgekv.workflows.calibration import mixed, written_windows


def surprise(source: LazySource, windows: np.ndarray) -> tuple[float, float]:
    """How far the mean surprise at windows is from the model's mean entropy, and the standard error of that."""
    model, gaps = ReferenceModel(source), []
    for window in windows.tolist():
        logs = log_softmax(model.logits(model.hidden(window, model.new_cache(len(window)))))[:-1]
        entropy = -(np.exp(logs) * logs).sum(axis=-1)
        gaps.append(-logs[np.arange(len(logs)), window[1:]] - entropy)
    return float(np.mean(gaps)), float(np.std(gaps) / np.sqrt(np.size(gaps)))


def test_llama_cpp_writes_what_the_model_would(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source, stages = make_llama(), []
    windows = written_windows(
        source, 20 * 48, 48, 3, tmp_path, lambda name: stages.append(name) or silent(name)
    )
    assert stages == ["preparing the model to write text", "writing calibration text"]
    assert windows.shape == (20, 48)
    gap, error = surprise(source, windows)
    assert abs(gap) < 4 * error
    assert list(tmp_path.iterdir()) == [], "the copy of the model is gone"


def test_the_same_seed_gives_the_same_text_on_any_number_of_cores(
    make_llama: Callable[..., LazySource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for n_cores, seed in ((1, 0), (3, 0), (1, 1)):
        monkeypatch.setattr("edgekv.backends.isolated.quantizer.default_threads", lambda n=n_cores: n)
        found.append(written_windows(make_llama(), 40 * 12, 12, seed, tmp_path, silent))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_the_reference_writes_where_there_is_no_llama_cpp(
    make_llama: Callable[..., LazySource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    source, stages = make_llama(), []
    windows = written_windows(
        source, 60, 10**6, 0, tmp_path, lambda name: stages.append(name) or silent(name)
    )
    assert stages == ["writing calibration text without llama.cpp"]
    assert windows.shape == (1, source.spec.context_length)


def test_caches_of_all_batches_stay_within_bounds(
    make_llama: Callable[..., LazySource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, seen = make_llama(), []

    class Spy:
        n_threads = 64

        def __init__(self, model: Path) -> None:
            assert model.exists()

        def sample(self, prompts: np.ndarray, length: int, *_: object) -> np.ndarray:
            seen.append(len(prompts))
            return np.zeros((len(prompts), length), np.int64)

    monkeypatch.setattr(calibration, "Quantizer", Spy)
    monkeypatch.setattr(calibration, "CACHE_NBYTES", 5 * 100 * source.spec.kv_bytes_per_token("f16"))
    assert written_windows(source, 1100, 100, 0, tmp_path, silent).shape == (11, 100)
    assert seen == [5, 5, 1]


def test_half_of_the_given_and_all_of_the_written_are_mixed() -> None:
    given, written = np.arange(14).reshape(7, 2), np.arange(100, 106).reshape(3, 2)
    found = mixed(given, written, 0)
    assert sorted(found.tolist()) == [*given[:4].tolist(), *written.tolist()]
    assert found.tolist() != [*given[:4].tolist(), *written.tolist()]
