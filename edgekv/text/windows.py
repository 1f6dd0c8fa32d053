"""Calibration tokens: windows from text files, or text that the model samples itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import InputError
from edgekv.progress import Progress
from edgekv.source import TensorSource
from edgekv.text.files import read_text
from edgekv.text.self_written import sample_windows
from edgekv.tokenizer.tokenizer import Tokenizer

WINDOW = 512  # tokens: more windows of fewer tokens see more of the beginnings that attention sinks on


def windows_from_files(
    paths: list[Path], tokenizer: Tokenizer, n_tokens: int, seed: int
) -> NDArray[np.int64]:
    """At most n_tokens from text files, as random windows (n, WINDOW), each file giving its share.

    Raises:
        InputError: a file cannot be read as text, or all of them together are shorter than one window.
    """
    rng = np.random.default_rng(seed)
    wanted = max(1, n_tokens // WINDOW)
    each = -(-wanted // len(paths))
    chosen = []
    for path in paths:
        ids = np.asarray(tokenizer.encode(_sample_text(path, each, rng)), np.int64)
        rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
        chosen.append(rows[rng.permutation(len(rows))[:each]])
    windows = np.concatenate(chosen)[:wanted]
    if not len(windows):
        raise InputError(
            f"the calibration text is shorter than one window of {WINDOW} tokens; give more with --text, "
            "or leave --text out and the model writes its own"
        )
    return windows


def _sample_text(path: Path, windows: int, rng: np.random.Generator) -> str:
    """Enough of a text for that many windows, as pieces from all over it, so that long files cost no more."""
    text = read_text(path, "--text")
    piece = 8 * WINDOW  # characters; no tokenizer here averages more than eight per token on text
    if len(text) <= piece * windows:
        return text
    starts = rng.permutation(len(text) // piece)[:windows] * piece
    return "".join(text[start : start + piece] for start in sorted(starts))


def windows_from_model(
    source: TensorSource, n_tokens: int, seed: int, progress: Progress, length: int
) -> NDArray[np.int64]:
    """Windows (n, length) that the model samples itself; decoding takes one step per token of a window."""
    length = min(length, source.spec.context_length)
    return sample_windows(source, max(1, n_tokens // length), length, seed, progress)
