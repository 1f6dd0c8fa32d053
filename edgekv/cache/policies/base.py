"""The Policy protocol: what a policy sees of a layer's cache, and how its scores become the rows that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.source import Array

Rows = NDArray[np.int64]  # indices of cached rows, ascending
Need = Literal["keys", "norms", "queries", "attention", "probe"]  # fields of LayerView


@dataclass(frozen=True)
class Probe:
    """What the queries to come are like, over the H query heads of a layer: their mean and covariance.

    Behind the mean of RoPE over positions to come, absorbed for a latent, and scaled as scores are.
    """

    mean: Array  # (H, K)
    covariance: Array | None = None  # (H, K, K)


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of the S rows that a layer caches for each of G KV heads; G is 1 for a latent.

    Fields that the policy does not need may be None.

    Attributes:
        keys: (G, S, K) behind RoPE; of a latent the whole row, R + P values.
        norms: (G, S): how far a row can move the layer's output, ||v W_O||; edgekv.cache.policies.norms.
        queries: (W, H, K) of the last W tokens, behind RoPE, absorbed for a latent, scaled as scores are.
        attention: (G, S): mean attention that each row got from the queries that saw it.
    """

    n_heads: int  # G
    n_rows: int  # S
    keys: Array | None = None
    norms: Array | None = None
    queries: Array | None = None
    attention: Array | None = None
    probe: Probe | None = None


class Policy(Protocol):
    """Scores the rows of one layer; those with the highest stay.

    Attributes:
        name: as options spell it.
        needs: the fields of LayerView that it reads.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Need]: ...

    def scores(self, view: LayerView, n_kept: int) -> Array:
        """A score for every row, (G, S), not negative; `n_kept` of them per head are to stay."""


def highest(scores: Array, n_kept: int) -> Rows:
    """Indices of the `n_kept` highest scores (..., S) along the last axis, ascending; of equal ones the later."""
    n_rows = scores.shape[-1]
    assert 0 <= n_kept <= n_rows, (n_kept, n_rows)
    if not n_kept:
        return np.zeros((*scores.shape[:-1], 0), np.int64)
    least = np.partition(scores, n_rows - n_kept, axis=-1)[..., n_rows - n_kept, None]
    above, equal = scores > least, scores == least
    missing = n_kept - above.sum(axis=-1, keepdims=True)
    among_last = equal[..., ::-1].cumsum(axis=-1)[..., ::-1] <= missing
    return np.nonzero(above | (equal & among_last))[-1].reshape(*scores.shape[:-1], n_kept)


def protected(scores: Array, n_sinks: int, n_recent: int) -> Array:
    """Scores (..., S) with the first and the last rows above all others."""
    out = scores.copy()
    out[..., :n_sinks] = np.inf
    out[..., out.shape[-1] - n_recent :] = np.inf
    return out


def chosen(scores: Array, n_kept: int, n_sinks: int, n_recent: int) -> Rows:
    """Indices of the `n_kept` rows that stay by scores (..., S): the first and the last rows, then the highest.

    Neither the first nor the last rows take more than half of those that stay.
    """
    return highest(protected(scores, min(n_sinks, n_kept // 2), min(n_recent, n_kept // 2)), n_kept)


def n_tail(rows: Rows, n_rows: int) -> int:
    """How many of the last of `n_rows` rows all heads keep, of the rows (..., n) that each keeps."""
    n = rows.shape[-1]
    kept = (rows[..., ::-1] == np.arange(n_rows - 1, n_rows - 1 - n, -1)).reshape(-1, n).all(axis=0)
    return n if kept.all() else int(np.argmin(kept))
