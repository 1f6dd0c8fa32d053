"""Sampling of the next token from logits, in NumPy.

The filters, their order and their defaults are llama.cpp's (common/sampling.cpp): repeat penalty, top-k,
top-p, min-p, temperature. Each filter keeps a prefix of the tokens sorted by logit, so only that prefix is
ever sorted: a few tens of values out of a vocabulary of 150,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import InputError
from edgekv.source import Array

BLOCK = 64  # values per group in `largest`


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling; the defaults are llama.cpp's.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # last tokens that the penalty covers, the prompt's included
    seed: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repeat_penalty": (self.repeat_penalty > 0, "above 0"),
            "repeat_last_n": (self.repeat_last_n >= 0, "0 or more"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (holds, words) in allowed.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {words}")


class Sampler:
    """Draws tokens with one random number generator."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: Array, recent: Sequence[int] = ()) -> int:
        """The next token, from logits (vocab,) and the tokens before it."""
        p = self.params
        if p.repeat_penalty != 1 and p.repeat_last_n:
            logits = penalized(logits, recent[-p.repeat_last_n :], p.repeat_penalty)
        if p.temperature == 0:
            return int(logits.argmax())
        tokens = candidates(logits, p)
        values = logits[tokens].astype(np.float64)
        masses = np.exp((values - values.max()) / p.temperature).cumsum()
        drawn = np.searchsorted(masses, self._random.random() * masses[-1], side="right")
        return int(tokens[min(drawn, len(tokens) - 1)])


def penalized(logits: Array, recent: Sequence[int], penalty: float) -> Array:
    """A copy with each recent token's logit divided by the penalty if positive, else multiplied by it
    (arXiv 1909.05858, section 4.1, as in llama.cpp)."""
    logits = logits.copy()
    tokens = np.unique(np.asarray(recent, np.int64))
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def candidates(logits: Array, params: SamplingParams) -> NDArray[np.int64]:
    """The tokens that pass top-k, then top-p among those, then min-p: at least one, likeliest first.

    With all three off: every token, unsorted.
    """
    top_k = min(params.top_k or len(logits), len(logits))
    if top_k == len(logits) and params.top_p == 1 and params.min_p == 0:
        return np.arange(len(logits))
    if params.top_k:
        tokens = largest(logits, top_k)
        masses = np.exp(logits[tokens].astype(np.float64) - float(logits[tokens[0]]))
        total = masses.sum()
    else:
        weights = np.exp(logits - logits.max())
        total = weights.sum(dtype=np.float64)
        tokens = _until_cut(weights, total, params)
        masses = weights[tokens].astype(np.float64)
    keep = len(tokens)
    if params.top_p < 1:
        keep = int(np.searchsorted(masses.cumsum() / total, params.top_p)) + 1
    if params.min_p > 0:
        keep = min(keep, int((masses >= params.min_p).sum()))
    return tokens[: max(1, keep)]


def _until_cut(weights: Array, total: float, params: SamplingParams) -> NDArray[np.int64]:
    """The likeliest tokens, sorted: at least all that top-p and min-p can let through without a top-k."""
    count = 64
    while count < len(weights):
        tokens = largest(weights, count)
        masses = weights[tokens]
        if masses[-1] < params.min_p or masses.sum(dtype=np.float64) > params.top_p * total:
            return tokens
        count *= 8
    return largest(weights, len(weights))


def largest(values: Array, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, equal ones by index.

    Partitioning a whole vocabulary takes half a millisecond and sorting it several. But the count-th largest
    of the maxima of groups of values is at most the count-th largest value, so that little more than `count`
    values are left to sort.
    """
    n_blocks = len(values) // BLOCK
    if count < n_blocks:
        maxima = values[: n_blocks * BLOCK].reshape(BLOCK, n_blocks).max(axis=0)
        floor = np.partition(maxima, n_blocks - count)[n_blocks - count]
        picked = np.flatnonzero(values >= floor)
    else:
        picked = np.arange(len(values))
    return picked[np.argsort(-values[picked], kind="stable")[:count]]
