"""KNorm: rows whose keys are short get much attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.source import Array


@dataclass(frozen=True)
class KNorm:
    """How much shorter a key is than the longest (arXiv 2406.11430)."""

    name: str = "knorm"
    needs: frozenset[Need] = frozenset({"keys"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.keys is not None
        lengths = lengths_of(view.keys)
        return np.asarray(lengths.max(axis=-1, keepdims=True) - lengths)


def lengths_of(keys: Array) -> Array:
    """||k|| of keys (G, S, K), in one pass over them: (G, S)."""
    return np.asarray(np.sqrt(np.einsum("gsk,gsk->gs", keys, keys)))
