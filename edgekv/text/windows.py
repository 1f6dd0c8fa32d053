"""Calibration tokens: windows from text files; and those by which a fit to them is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import InputError
from edgekv.text.files import read_text
from edgekv.tokenizer.tokenizer import Tokenizer

# Prose, verse, dialogue, code, tables, a recipe: written for this, or in the public domain.
OTHER_KINDS = Path(__file__).with_name("other_kinds.txt")
OTHER_TOKENS = 2048
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


def windows_of_other_kinds(tokenizer: Tokenizer, length: int) -> NDArray[np.int64] | None:
    """Windows (n, length) of a text that ships with EdgeKV, at most OTHER_TOKENS; None if it is shorter than one."""
    ids = np.asarray(tokenizer.encode(read_text(OTHER_KINDS)), np.int64)
    n = min(len(ids), max(OTHER_TOKENS, length)) // length
    return ids[: n * length].reshape(n, length) if n else None
