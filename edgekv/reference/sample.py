"""A sampler at temperature 1: text that a model writes itself, for calibration and checks without a corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekv.progress import Progress
from edgekv.source import Array

Step = Callable[[NDArray[np.int64], int], Array]


def draw(logits: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """One token from the softmax of each row of logits (..., vocab), by the Gumbel-max trick.

    The argmax of logits plus Gumbel noise is a draw from their softmax (arXiv 1411.0030).
    """
    return np.asarray((logits - np.log(rng.exponential(size=logits.shape))).argmax(axis=-1), np.int64)


def write_on(
    step: Step, prompts: NDArray[np.int64], length: int, rng: np.random.Generator, progress: Progress
) -> NDArray[np.int64]:
    """Windows (B, length) that begin with prompts (B, P) and go on with what the model draws, all side by side.

    Args:
        step: appends one token of each sequence, (B,), at a position; the logits of what follows, (B, vocab).
        progress: counts positions.
    """
    n, given = prompts.shape
    windows = np.zeros((n, length), np.int64)
    windows[:, :given] = prompts
    for position in range(length - 1):
        logits = step(windows[:, position], position)
        if position + 1 >= given:
            windows[:, position + 1] = draw(logits, rng)
        progress(position + 1, length - 1)
    return windows
