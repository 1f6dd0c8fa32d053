"""H2O: rows that got much attention so far."""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.cache.policies.base import LayerView, Need
from edgekv.source import Array


@dataclass(frozen=True)
class H2O:
    """Mean attention by the queries that saw a row (heavy hitters, arXiv 2306.14048)."""

    name: str = "h2o"
    needs: frozenset[Need] = frozenset({"attention"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.attention is not None
        return view.attention
