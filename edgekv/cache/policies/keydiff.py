"""KeyDiff: rows whose keys differ most from all others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.cache.policies.knorm import lengths_of
from edgekv.source import Array


@dataclass(frozen=True)
class KeyDiff:
    """1 minus the cosine of a key and the mean of all normalised keys (arXiv 2504.15364)."""

    name: str = "keydiff"
    needs: frozenset[Need] = frozenset({"keys"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.keys is not None
        lengths = np.maximum(lengths_of(view.keys), np.float32(1e-12))
        # einsum: a BLAS takes some megabytes of its own once it is called
        mean = np.einsum("gs,gsk->gk", 1 / lengths, view.keys)  # n times the mean
        mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        cosines = np.einsum("gsk,gk->gs", view.keys, mean) / lengths
        return np.asarray(np.maximum(1 - cosines, 0))
