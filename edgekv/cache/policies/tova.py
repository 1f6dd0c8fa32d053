"""TOVA: what the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.cache.policies.observe import attention_of
from edgekv.source import Array


@dataclass(frozen=True)
class TOVA:
    """Attention of the last query, the mean over all heads of a layer (arXiv 2401.06104); its own row stays."""

    name: str = "tova"
    needs: frozenset[Need] = frozenset({"keys", "queries"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.keys is not None
        assert view.queries is not None
        scores = attention_of(view.queries[-1:], view.keys)[:, 0].mean(axis=0)  # (S,)
        scores[-1] = scores.max() + 1
        return np.broadcast_to(scores, (view.n_heads, view.n_rows))
