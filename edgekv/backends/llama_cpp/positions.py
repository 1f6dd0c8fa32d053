"""Which positions the rows of llama.cpp's cache have, once some of them were evicted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.policies.base import Rows, n_tail


class CachedPositions:
    """The positions of a sequence's rows, ascending; those from `dense_from` on have no gap."""

    def __init__(self) -> None:
        self._kept: NDArray[np.int64] = np.zeros(0, np.int64)  # behind the last eviction
        self._since = self.dense_from = 0  # every position from here on came later

    def all(self, n_past: int) -> NDArray[np.int64]:
        """The positions, (S,), of which the last is n_past - 1."""
        return np.concatenate([self._kept, np.arange(self._since, n_past)])

    def count(self, n_past: int) -> int:
        """S."""
        return len(self._kept) + n_past - self._since

    def keep(self, rows: Rows, n_past: int) -> NDArray[np.int64]:
        """Note that only these rows are left; the positions of the others."""
        positions = self.all(n_past)
        self.dense_from = max(self.dense_from, n_past - n_tail(rows, len(positions)))
        self._kept, self._since = positions[rows], n_past
        return np.delete(positions, rows)

    def trim(self, n_past: int) -> None:
        """Note that the end is cut off, or all of it."""
        if not n_past:
            self.dense_from = 0
        self._kept = self._kept[self._kept < n_past]
        self._since = min(self._since, n_past)


def runs(positions: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ascending positions as ranges [start, stop)."""
    edges = np.flatnonzero(np.diff(positions) > 1) + 1
    for start, stop in itertools.pairwise([0, *edges.tolist(), len(positions)]):
        yield int(positions[start]), int(positions[stop - 1]) + 1
