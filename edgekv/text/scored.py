"""Windows of a text to score, and the logits of a window's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import Backend
from edgekv.backends.evicting import evict_now
from edgekv.errors import InputError
from edgekv.source import Array
from edgekv.text.files import read_hashed_text
from edgekv.tokenizer.tokenizer import Tokenizer

ROWS = 128  # logits held at once: 25 MB with a vocabulary of 49,152


@dataclass(frozen=True)
class Text:
    """A text in windows."""

    name: str
    sha256: str
    n_tokens: int  # of the whole text
    windows: NDArray[np.int64]  # (n, length)
    scored: int | None = None  # predictions at the end of a window that are scored; None: its second half

    @property
    def length(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    @property
    def first(self) -> int:
        """Position of the first prediction that is scored."""
        return self.length // 2 if self.scored is None else self.length - 1 - self.scored

    @property
    def n_scored(self) -> int:
        """Predictions scored per window."""
        return self.length - self.first - 1

    def window(self, index: int) -> list[int]:
        """Tokens of a window."""
        return [int(token) for token in self.windows[index]]

    def identity(self) -> dict[str, str | int | None]:
        """Key of cached results: what the figures of a window depend on."""
        return {"text": self.sha256, "length": self.length, "first": self.first}


def cut_windows(
    path: Path,
    tokenizer: Tokenizer,
    length: int,
    limit: int | None,
    option: str = "--window",
    scored: int | None = None,
) -> Text:
    """A text file in windows, the first `limit` of them; `option` is what a user shortens them by.

    Args:
        scored: predictions at the end of each window to score; by default those of its second half.

    Raises:
        InputError: the file cannot be read, or is shorter than one window.
    """
    if length < 4:
        raise InputError(f"a window of {length} tokens has no half to score; take 4 or more")
    if scored is not None and not 1 <= scored < length:
        raise InputError(
            f"a window of {length} tokens has no {scored} predictions to score; take fewer, or larger windows"
        )
    text, sha256 = read_hashed_text(path)
    tokens = np.asarray(tokenizer.encode(text), np.int64)
    count = len(tokens) // length
    if not count:
        raise InputError(
            f"{path} has {len(tokens)} tokens, less than one window of {length}; shorten {option}"
        )
    windows = tokens[: count * length].reshape(count, length)[:limit]
    return Text(path.name, sha256, len(tokens), windows, scored)


def scored_logits(
    backend: Backend, tokens: Sequence[int], first: int
) -> Iterator[tuple[NDArray[np.int64], Array]]:
    """Run tokens from an empty cache; (targets (t,), logits (t, vocab)) of the predictions from `first` on.

    A cache of fixed size is cut to its budget before them.
    """
    backend.trim(0)
    if first:
        backend.prefill(tokens[:first])
        evict_now(backend)
    for start in range(first, len(tokens) - 1, ROWS):
        stop = min(start + ROWS, len(tokens) - 1)
        yield np.asarray(tokens[start + 1 : stop + 1], np.int64), backend.prefill_all(tokens[start:stop])
