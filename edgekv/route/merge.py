"""Attention over rows that lie in several places: each gives a partial result, which online softmax merges.

The oracle of every routed query: equal to attention over all rows at once, in whatever order the parts come
(Milakov and Gimelshein, arXiv 1805.02867; FlashDecoding's reduction).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgekv.source import Array


@dataclass(frozen=True)
class Partial:
    """Attention over some of the rows, of queries (..., H).

    Attributes:
        maximum: the largest score (..., H); minus infinity over no rows.
        total: the sum of exp(score - maximum), (..., H).
        output: the sum of exp(score - maximum) times values, (..., H, V).
    """

    maximum: Array
    total: Array
    output: Array

    @property
    def attended(self) -> Array:
        """What attention over these rows alone gives, (..., H, V)."""
        return np.asarray(self.output / self.total[..., None])


def partial_attention(queries: Array, keys: Array, values: Array, scale: float) -> Partial:
    """Attention of queries (..., H, K) over keys (S, K) and values (S, V) that all heads share, as latents are.

    The sums are in the type of the queries; S may be 0.
    """
    scores = queries @ keys.T * scale
    maximum = scores.max(axis=-1, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(maximum), maximum, 0.0)[..., None])
    return Partial(maximum, weights.sum(axis=-1), weights @ values)


def merged(parts: Iterable[Partial]) -> Partial:
    """Attention over the rows of all parts; at least one of them has rows."""
    found = list(parts)
    maximum = np.max([part.maximum for part in found], axis=0)
    shares = [np.exp(part.maximum - maximum) for part in found]
    total = sum(share * part.total for share, part in zip(shares, found, strict=True))
    output = sum(share[..., None] * part.output for share, part in zip(shares, found, strict=True))
    return Partial(maximum, np.asarray(total), np.asarray(output))
