"""Text that the model writes itself: its batched decode against the reference, and its beginnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekv.progress import Progress, ignore
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.reference.sample import draw
from edgekv.source import LazySource
from edgekv.text.self_written import reference_writer, self_written


def written(
    source: LazySource, shape: tuple[int, int], seed: int, at_once: int = 64, progress: Progress = ignore
) -> np.ndarray:
    writer = reference_writer(source)
    return self_written(writer, source.metadata, source.spec.vocab, [], shape, seed, progress, at_once)


@pytest.mark.parametrize("traits", [{}, {"qk_norm": True, "window": 7, "softcap": 5.0}, {"bias": True}])
def test_it_is_drawn_from_the_models_own_distribution(
    make_llama: Callable[..., LazySource], traits: dict[str, Any]
) -> None:
    """Replays the sampler's random draws on the reference's logits: every token must come out the same."""
    source = make_llama(tied=False, **traits)
    windows = written(source, (3, 40), 5)
    assert windows.shape == (3, 40)
    model, rng = ReferenceModel(source), np.random.default_rng(5)
    logits = np.stack(
        [model.logits(model.hidden(window.tolist(), model.new_cache(40))) for window in windows]
    )
    for position in range(39):
        np.testing.assert_array_equal(draw(logits[:, position], rng), windows[:, position + 1])


def test_seed_and_progress(make_llama: Callable[..., LazySource]) -> None:
    steps: list[tuple[int, int]] = []
    progress = lambda done, total, _="": steps.append((done, total))  # noqa: E731
    first = written(make_llama(), (2, 12), 0, progress=progress)
    assert steps == [(2 * i, 22) for i in range(1, 12)]
    np.testing.assert_array_equal(first, written(make_llama(), (2, 12), 0))
    assert (first != written(make_llama(), (2, 12), 1)).any()


def test_batches_differ_and_are_counted_as_one(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama()
    seen: list[tuple[list[list[int]], int]] = []

    def writer(prompts: np.ndarray, length: int, seed: int, progress: Progress, /) -> np.ndarray:
        seen.append((prompts.tolist(), seed))
        progress(length - 1, length - 1)
        return np.tile(prompts[:, -1:], (1, length))

    told: list[tuple[int, int]] = []
    progress = lambda done, total, _="": told.append((done, total))  # noqa: E731
    found = self_written(writer, source.metadata, source.spec.vocab, [7, 8], (5, 9), 3, progress, 2)
    assert found.shape == (5, 9)
    assert [len(prompts) for prompts, _ in seen] == [2, 2, 1]
    assert len({seed for _, seed in seen}) == 3
    assert all(row[:2] == [7, 8] for prompts, _ in seen for row in prompts)
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_it_starts_with_text(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama(filler=500)
    kinds = np.asarray(source.metadata["tokenizer.ggml.token_type"])
    starts = written(source, (64, 2), 0)[:, 0]
    assert (kinds[starts] == 1).all()


def test_it_is_likelier_than_chance(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama()
    window = written(source, (1, 200), 0)[0]
    model = ReferenceModel(source)
    log = log_softmax(model.logits(model.hidden(window.tolist(), model.new_cache(200))))
    assert -log[np.arange(199), window[1:]].mean() < np.log(source.spec.vocab) - 0.5
