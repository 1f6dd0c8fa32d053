"""Coefficients of costs, fitted to what was measured: seconds that are sums of known terms."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_TERMS = 8  # all subsets of them are tried
RECENT = 256  # measurements that count


def fitted(terms: Array, seconds: Array) -> Array:
    """The coefficients (k,), none below 0, for which terms (n, k) add up best to seconds (n,), in relative squares.

    Exact: the best of the least-squares solutions over all subsets of the terms that have no negative coefficient
    is the constrained optimum. Terms that are always 0 get 0.
    """
    n_terms = terms.shape[1]
    assert n_terms <= MAX_TERMS, n_terms
    weighted = terms / seconds[:, None]
    scales = np.abs(weighted).max(axis=0)
    scales[scales == 0] = 1.0
    scaled = weighted / scales
    best, least = np.zeros(n_terms), np.inf
    for size in range(1, n_terms + 1):
        for chosen in map(list, itertools.combinations(range(n_terms), size)):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            loss = float(np.square(scaled[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and loss < least * (1 - 1e-9):
                best, least = np.zeros(n_terms), loss
                best[chosen] = found
    return np.asarray(best / scales)


class Measurements:
    """The latest measurements of one kind, and the coefficients that fit them."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior` are the coefficients while nothing has been measured."""
        self._coefficients = tuple(prior)
        self._seen: deque[tuple[Sequence[float], float]] = deque(maxlen=RECENT)
        self._stale = False

    def add(self, terms: Sequence[float], seconds: float) -> None:
        """Note that something with these terms took some seconds; a clock that stood still is no measurement."""
        if seconds > 0:
            self._seen.append((terms, seconds))
            self._stale = True

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Those that fit now."""
        if self._stale:
            terms, seconds = zip(*self._seen, strict=True)
            found = fitted(np.array(terms, np.float64), np.array(seconds, np.float64))
            self._coefficients, self._stale = tuple(float(each) for each in found), False
        return self._coefficients
