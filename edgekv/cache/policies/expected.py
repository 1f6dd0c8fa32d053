"""Expected attention: what queries to come will look at, if they are like those so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekv.cache.policies.base import LayerView, Need
from edgekv.source import Array


@dataclass(frozen=True)
class ExpectedAttention:
    """Attention by a query of known mean and covariance, RoPE averaged over positions to come (arXiv 2510.00636).

    E[exp(q k)] = exp(mean k + k' covariance k / 2) for a normal q. Not weighed by the values' norms: `critical-` does
    that. n_sinks: first rows that stay.
    """

    n_sinks: int = 4
    name: str = "expected"
    needs: frozenset[Need] = frozenset({"keys", "probe"})

    def scores(self, view: LayerView, n_kept: int) -> Array:
        assert view.keys is not None
        assert view.probe is not None
        sinks = min(self.n_sinks, view.n_rows - 1)
        keys = view.keys[:, sinks:]
        n_groups, _, width = keys.shape
        mean = view.probe.mean.reshape(n_groups, -1, width)
        logits = mean @ keys.swapaxes(-2, -1)  # (G, H/G, S)
        if view.probe.covariance is not None:
            covariance = view.probe.covariance.reshape(n_groups, -1, width, width)
            logits = logits + ((keys[:, None] @ covariance) * keys[:, None]).sum(axis=-1) / 2
        logits -= logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits)
        scores = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)
        return np.pad(scores, ((0, 0), (sinks, 0)), constant_values=scores.max() + 1)
