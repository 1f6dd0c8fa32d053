"""Text that the model writes itself: its batched decode against the reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.source import LazySource
from edgekv.text.self_written import sample_windows


def quiet(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("traits", [{}, {"qk_norm": True, "window": 7, "softcap": 5.0}, {"bias": True}])
def test_it_is_drawn_from_the_models_own_distribution(
    make_llama: Callable[..., LazySource], traits: dict[str, Any]
) -> None:
    """Replays the sampler's random draws on the reference's logits: every token must come out the same."""
    source = make_llama(tied=False, **traits)
    windows = sample_windows(source, 3, 40, 5, quiet)
    assert windows.shape == (3, 40)
    rng = np.random.default_rng(5)
    rng.choice(np.flatnonzero(np.asarray(source.metadata["tokenizer.ggml.token_type"]) == 1), 3)
    model = ReferenceModel(source)
    logits = [model.logits(model.hidden(window.tolist(), model.new_cache(40))) for window in windows]
    for position in range(39):
        noise = -np.log(rng.exponential(size=(3, source.spec.vocab)))
        for i, window in enumerate(windows):
            assert (logits[i][position] + noise[i]).argmax() == window[position + 1]


def test_seed_and_progress(make_llama: Callable[..., LazySource]) -> None:
    steps: list[tuple[int, int]] = []
    first = sample_windows(make_llama(), 2, 12, 0, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 11) for i in range(1, 12)]
    np.testing.assert_array_equal(first, sample_windows(make_llama(), 2, 12, 0, quiet))
    assert (first != sample_windows(make_llama(), 2, 12, 1, quiet)).any()


def test_it_starts_with_text(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama(filler=500)
    kinds = np.asarray(source.metadata["tokenizer.ggml.token_type"])
    starts = sample_windows(source, 64, 2, 0, quiet)[:, 0]
    assert (kinds[starts] == 1).all()


def test_it_is_likelier_than_chance(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama()
    window = sample_windows(source, 1, 200, 0, quiet)[0]
    model = ReferenceModel(source)
    log = log_softmax(model.logits(model.hidden(window.tolist(), model.new_cache(200))))
    assert -log[np.arange(199), window[1:]].mean() < np.log(source.spec.vocab) - 0.5
