"""StreamingLLM: the first rows and the last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.source import Array


@dataclass(frozen=True)
class Streaming:
    """Attention sinks and a window (arXiv 2309.17453); positions stay what they were.

    n_sinks: first rows that stay.
    """

    n_sinks: int = 4
    name: str = "streaming"
    needs: frozenset[Need] = frozenset()

    def scores(self, view: LayerView, n_kept: int) -> Array:
        scores = np.zeros(view.n_rows, np.float32)
        sinks = min(self.n_sinks, n_kept)
        scores[:sinks] = 1
        scores[view.n_rows - (n_kept - sinks) :] = 1
        return np.broadcast_to(scores, (view.n_heads, view.n_rows))
