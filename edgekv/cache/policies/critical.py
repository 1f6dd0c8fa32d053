"""CriticalKV: how far the output can move, not attention alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need, Policy, highest
from edgekv.source import Array

FIRST = 0.5  # share of the rows that stay by the scores alone
EPSILON = 1e-4


@dataclass(frozen=True)
class Critical:
    """Another policy in two stages (arXiv 2502.03805, algorithm 1).

    Half of the rows stay by its scores; the others are chosen by score times the norm of the value behind the output
    matrix, which bounds what leaving a row out changes. The scores are not negative, or a large norm would count
    against a row.
    """

    policy: Policy

    @property
    def name(self) -> str:
        return f"critical-{self.policy.name}"

    @property
    def needs(self) -> frozenset[Need]:
        return self.policy.needs | {"norms"}

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.norms is not None
        scores = self.policy.scores(view, n_kept)
        first = highest(scores, max(1, int(n_kept * FIRST)))
        assert scores.min(initial=0) >= 0, "a norm would count the wrong way"
        weighed = np.asarray((scores + EPSILON) * view.norms)
        above = weighed.max(axis=-1, keepdims=True) + 1 + np.take_along_axis(scores, first, axis=-1)
        np.put_along_axis(weighed, first, above, axis=-1)
        return weighed
