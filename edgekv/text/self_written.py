"""Calibration text that the model writes itself, for users without a corpus.

The first token of each sequence is drawn from the vocabulary and the rest from the model (LLM-QAT,
arXiv 2305.17888, section 2.1). Many sequences advance together: the weights are read once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.progress import Progress
from edgekv.reference.model import ReferenceModel
from edgekv.reference.sample import write_on
from edgekv.source import Array, TensorSource
from edgekv.spec import Metadata
from edgekv.tokenizer.vocab import text_tokens

AT_ONCE = 16  # sequences per batch: more gain little, and need memory for their caches


class Writer(Protocol):
    """A model in some engine."""

    def __call__(
        self, prompts: NDArray[np.int64], length: int, seed: int, progress: Progress, /
    ) -> NDArray[np.int64]:
        """Token windows (n, length) that go on from prompts (n, P) at temperature 1; `progress` counts positions."""


def self_written(
    writer: Writer,
    metadata: Metadata,
    n_vocab: int,
    opening: Sequence[int],
    shape: tuple[int, int],
    seed: int,
    progress: Progress,
    at_once: int = AT_ONCE,
    n_workers: int = 1,
) -> NDArray[np.int64]:
    """Token windows of a shape (n, length), each from another first token, in batches of `at_once`.

    Args:
        opening: tokens in front of every window: models trained with a beginning-of-text token fail without it.
        n_workers: batches that are written at the same time; the text does not depend on it.
    """
    n, length = shape
    first = np.random.default_rng(seed).choice(text_tokens(metadata, n_vocab), (n, 1))
    prompts = np.concatenate([np.tile(np.asarray(opening, np.int64), (n, 1)), first], axis=1)[:, :length]
    done = dict.fromkeys(range(0, n, at_once), 0)  # tokens of each batch, by its first window

    def write(start: int) -> NDArray[np.int64]:
        batch = prompts[start : start + at_once]

        def advance(position: int, last: int, _: str = "", /) -> None:
            done[start] = position * len(batch)
            progress(sum(done.values()), n * last)

        return writer(batch, length, seed + start, advance)

    with ThreadPoolExecutor(n_workers) as pool:
        return np.concatenate(list(pool.map(write, done)))


def reference_writer(source: TensorSource) -> Writer:
    """The NumPy reference as a writer, for any source and without an engine."""
    model = ReferenceModel(source)

    def write(prompts: NDArray[np.int64], length: int, seed: int, progress: Progress, /) -> NDArray[np.int64]:
        cache = model.new_cache(length, len(prompts))

        def step(tokens: NDArray[np.int64], position: int) -> Array:
            return model.logits(model.hidden(tokens[:, None], cache)[:, 0])

        return write_on(step, prompts, length, np.random.default_rng(seed), progress)

    return write
