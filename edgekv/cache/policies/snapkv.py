"""SnapKV: what the last tokens look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.cache.policies.observe import WINDOW, attention_of
from edgekv.source import Array


@dataclass(frozen=True)
class SnapKV:
    """Mean attention of the last queries, smoothed over neighbours (arXiv 2404.14469).

    window: last queries asked; their own rows stay. kernel: rows that the smoothing averages.
    """

    window: int = WINDOW
    kernel: int = 5
    name: str = "snapkv"
    needs: frozenset[Need] = frozenset({"keys", "queries"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.keys is not None
        assert view.queries is not None
        asked = self.window if n_kept > self.window else max(n_kept // 2, 1)
        queries = view.queries[-asked:]
        weights = attention_of(queries, view.keys).mean(axis=1)[:, : -len(queries)]  # (G, S - W)
        scores = smoothed(weights, self.kernel)
        above = scores.max(initial=0.0) + 1
        return np.pad(scores, ((0, 0), (0, len(queries))), constant_values=above)


def smoothed(scores: Array, kernel: int) -> Array:
    """Running means of `kernel` scores (G, S) around each; beyond the ends there are zeros."""
    if not scores.shape[-1]:
        return scores
    padded = np.pad(scores, ((0, 0), (kernel // 2, kernel // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1)
    return np.asarray(windows.mean(axis=-1))
