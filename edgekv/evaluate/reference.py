"""The model that others are held against, as distributions over a text: run once, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgekv.backends.base import Backend
from edgekv.errors import BackendError
from edgekv.evaluate.compact import CompactRows, compact
from edgekv.evaluate.pool import Run, run_units
from edgekv.evaluate.reference_cache import ReferenceStore, open_reference_store
from edgekv.evaluate.subject import Subject
from edgekv.evaluate.text import Text, scored_logits


class Reference:
    """A reference's distributions at a text's scored predictions.

    `key` tells this reference from others: by model, engine and protocol.
    """

    def __init__(self, subject: Subject, text: Text, store: ReferenceStore, key: str) -> None:
        self._subject, self._text, self._store = subject, text, store
        self.key = key

    def fill(self, run: Run) -> None:
        """Run the reference on the windows that the store lacks.

        Raises:
            BackendError: the engine failed, or gave logits that are not numbers.
        """
        total = len(self._text.windows)
        if len(self._store) >= total:
            return
        run.progress(len(self._store), total, "")
        items = ((i, self._text.window(i), self._text.first) for i in range(len(self._store), total))
        for rows in run_units(self._subject, self._text.length, run, compact_window, items):
            self._store.append(rows)
            run.progress(len(self._store), total, "")

    def read(self, window: int) -> CompactRows:
        """The distributions of a window that `fill` has made."""
        return self._store.read(window)


def compact_window(backend: Backend, item: tuple[int, list[int], int]) -> CompactRows:
    """The distributions of one window: its index, its tokens, the position of the first scored prediction."""
    index, tokens, first = item
    rng = np.random.default_rng(index)
    parts = []
    for targets, logits in scored_logits(backend, tokens, first):
        if not np.isfinite(logits).all():
            raise BackendError(f"the reference's logits are not finite in window {index}")
        parts.append(compact(logits, targets, rng))
    return CompactRows.join(parts)


@contextmanager
def open_reference(
    subject: Subject, text: Text, vocab: int, folder: Path, fresh: bool
) -> Iterator[Reference]:
    """The reference with what earlier runs left in `folder`; raises as journal.open_held does."""
    identity = subject.identity() | text.identity()
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with open_reference_store(folder, identity, text.n_scored, vocab, fresh) as store:
        yield Reference(subject, text, store, key)
