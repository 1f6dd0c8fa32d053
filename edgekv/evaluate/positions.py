"""Perplexity by position, up to the full context, which shows a cache that fails over long distances.

The text is cut into sequences as long as the context; every token but the first is predicted. Positions are
grouped between powers of two.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import Backend
from edgekv.evaluate.journal import Identity, measure
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.top_and_tail import log_sum_exp, target_nll
from edgekv.evaluate.windows import perplexity, standard_error
from edgekv.evaluate.workers import Run
from edgekv.text.scored import Text, scored_logits

FIRST_EDGE = 256


@dataclass(frozen=True)
class PositionBucket:
    """Predictions made with at least `start` and less than `stop` tokens in the cache."""

    start: int
    stop: int
    tokens_scored: int
    ppl: float
    reference_ppl: float | None
    ppl_ratio: float | None
    ppl_ratio_se: float | None  # over sequences; 0 with one


@dataclass(frozen=True)
class PositionsResult:
    """Perplexity by position."""

    text: str
    text_sha256: str
    context: int
    sequences: int
    buckets: tuple[PositionBucket, ...]


def bucket_edges(context: int) -> list[int]:
    """0, 256, 512, 1024 ... up to the last prediction of a context."""
    edges = itertools.takewhile(lambda edge: edge < context - 1, (FIRST_EDGE << i for i in itertools.count()))
    return [0, *edges, context - 1]


def measure_positions(text: Text, subject: ModelUnderTest, run: Run) -> NDArray[np.float64]:
    """Summed loss of each sequence in each bucket, (sequences, buckets); raises as journal.measure does."""
    identity: Identity = {"text": text.sha256, "context": text.length}
    count = len(text.windows)
    return np.array(
        measure(subject, run, "positions", identity, text.length, score_sequence, text.window, count)
    )


def positions_result(
    text: Text, losses: NDArray[np.float64], reference: NDArray[np.float64] | None
) -> PositionsResult:
    """Perplexity per bucket from the losses (sequences, buckets) of a model and of its reference."""
    edges = bucket_edges(text.length)
    buckets = []
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        scored = (stop - start) * len(losses)
        mean = float(losses[:, i].sum()) / scored
        base = ratio = error = None
        if reference is not None:
            base_mean = float(reference[:, i].sum()) / scored
            base, ratio = perplexity(base_mean), perplexity(mean - base_mean)
            differences = (losses[:, i] - reference[:, i]) / (stop - start)
            error = ratio * standard_error(differences)
        buckets.append(PositionBucket(start, stop, scored, perplexity(mean), base, ratio, error))
    return PositionsResult(text.name, text.sha256, text.length, len(losses), tuple(buckets))


def score_sequence(backend: Backend, tokens: list[int]) -> list[float]:
    """Summed loss of a sequence in each bucket."""
    nll = []
    for targets, logits in scored_logits(backend, tokens, 0):
        log_sums, _ = log_sum_exp(logits)
        nll.append(target_nll(logits, log_sums, targets))
    losses = np.concatenate(nll)
    edges = bucket_edges(len(tokens))
    return [float(losses[a:b].sum()) for a, b in itertools.pairwise(edges)]
