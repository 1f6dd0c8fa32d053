"""A sampler at temperature 1: text that a model writes itself, for calibration and checks without a corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekv.progress import Progress
from edgekv.source import Array

Step = Callable[[NDArray[np.int64], int], Array]
BLOCK = 256  # tokens whose probabilities are summed first: cumulative sums are slow


def draw(logits: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """One token from the softmax of each row of logits (..., vocab), by its inverse distribution function."""
    rows = logits.reshape(-1, logits.shape[-1])
    weights = np.exp(rows - rows.max(axis=-1, keepdims=True))
    blocks = np.add.reduceat(weights, np.arange(0, weights.shape[-1], BLOCK), axis=-1, dtype=np.float64)
    drawn = np.empty(len(rows), np.int64)
    for i, (row, upper) in enumerate(zip(weights, blocks.cumsum(axis=-1), strict=True)):
        place = rng.random() * upper[-1]
        block = int(np.searchsorted(upper, place, "right"))
        start = block * BLOCK
        inside = row[start : start + BLOCK].cumsum(dtype=np.float64)
        offset = np.searchsorted(inside, place - (upper[block - 1] if block else 0.0), "right")
        drawn[i] = start + min(int(offset), len(inside) - 1)
    return drawn.reshape(logits.shape[:-1])


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
