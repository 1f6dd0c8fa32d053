"""One choice for all layers and heads, for engines in which a token leaves all of them at once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgekv.source import Array


def merged(scores: Iterable[Array]) -> Array:
    """Mean rank of each row over layers and heads, (S,), from scores (G, S) of each layer.

    Scores of two layers have no common unit; ranks have.
    """
    total, n_heads = np.zeros(0), 0
    for layer in scores:
        ranks = ranked(layer)
        total = ranks.sum(axis=0) + (total if n_heads else 0.0)
        n_heads += len(layer)
    return np.asarray(total / n_heads)


def ranked(scores: Array) -> Array:
    """Ranks of scores (G, S) along the last axis: 0 for the lowest, 1 for the highest."""
    order = np.argsort(scores, axis=-1, kind="stable")
    ranks = np.empty(scores.shape, np.float32)
    steps = np.linspace(0, 1, scores.shape[-1], dtype=np.float32)
    np.put_along_axis(ranks, order, np.broadcast_to(steps, scores.shape), axis=-1)
    return ranks
