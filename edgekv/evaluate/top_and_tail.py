"""Compact next-token distributions, a thousandth of the size, exact enough for a KL divergence.

A row of 49,152 float32 log-probabilities is 196 KB; 150,000 of them are 30 GB. Kept of each row: its TOP
likeliest tokens exactly, the probability of all others together (the tail), and SAMPLES tokens drawn from the
tail. KL(p || q) splits by the chain rule into the part over top tokens and the tail as one symbol, which is
exact, and tail * KL(p_tail || q_tail), which the samples estimate without bias. Of a ratio t = q_tail / p_tail the
mean under p_tail is known to be 1, so c * (mean(t) - 1) is taken off the mean of -log t, with the c that
leaves the least variance (a control variate; with c = 1 it is John Schulman's "k3" estimator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import BackendError
from edgekv.reference.ops import kl_rows
from edgekv.source import Array

TOP = 128
SAMPLES = 64
MIN_TAIL = 1e-5  # a lighter tail counts as none: it costs KL less than that, and 1 - sum(q) is rounding there


@dataclass(frozen=True)
class CompactRows:
    """N distributions p. The first `top` columns of `ids` and `log_p` are the likeliest tokens in falling order,
    the others are drawn from the tail with probability p / tail, with replacement."""

    top: int
    ids: NDArray[np.uint32]  # (N, K)
    log_p: Array  # (N, K)
    tail: Array  # (N,) probability of all but the top tokens; 0 if it is below MIN_TAIL
    nll: Array  # (N,) -log p of the token that really follows

    @property
    def argmax(self) -> NDArray[np.uint32]:
        """The likeliest token of each row, (N,)."""
        return self.ids[:, 0]

    def rows(self, start: int, stop: int) -> CompactRows:
        """Some of the rows."""
        part = slice(start, stop)
        return CompactRows(self.top, self.ids[part], self.log_p[part], self.tail[part], self.nll[part])

    @classmethod
    def join(cls, parts: Sequence[CompactRows]) -> CompactRows:
        """Rows of several batches, one after the other."""
        return cls(
            parts[0].top,
            *map(np.concatenate, zip(*((p.ids, p.log_p, p.tail, p.nll) for p in parts), strict=True)),
        )


def log_sum_exp(logits: Array) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """log(sum(exp(row))) and argmax of each row of logits (N, vocab); the logits stay as they are.

    Row by row through one buffer that stays in the CPU's cache: of the 4 passes only argmax reads memory.
    """
    best = logits.argmax(axis=-1)
    buffer = np.empty(logits.shape[-1], np.float32)
    sums = np.empty(len(logits))
    for i, row in enumerate(logits):
        np.subtract(row, row[best[i]], out=buffer)
        np.exp(buffer, out=buffer)
        sums[i] = buffer.sum()
    return np.log(sums) + logits[np.arange(len(logits)), best], best


def target_nll(
    logits: Array, log_sums: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """-log p(target) of each row, (N,).

    Raises:
        BackendError: a logit is not a number, or infinite.
    """
    nll = np.asarray(log_sums - logits[np.arange(len(logits)), targets], np.float64)
    if not np.isfinite(nll).all():
        raise BackendError("the engine's logits are not finite; try --cache-type f32")
    return nll


def compact(logits: Array, targets: NDArray[np.int64], rng: np.random.Generator) -> CompactRows:
    """Keep the top and a sample of each row of logits (N, vocab)."""
    log_sums, _ = log_sum_exp(logits)
    n, vocab = logits.shape
    top = min(TOP, vocab)
    ids = np.zeros((n, top + SAMPLES), np.uint32)
    tail = np.zeros(n, np.float32)
    p = np.empty(vocab, np.float32)
    for i, row in enumerate(logits):
        likeliest = np.argpartition(row, vocab - top)[vocab - top :]
        likeliest = likeliest[np.argsort(-row[likeliest], kind="stable")]
        ids[i, :top] = likeliest
        np.subtract(row, log_sums[i], out=p, casting="same_kind")
        np.exp(p, out=p)
        p[likeliest] = 0
        ids[i, top:], tail[i] = _draw(p, rng)
    log_p = np.take_along_axis(logits, ids, axis=-1) - log_sums[:, None]
    nll = target_nll(logits, log_sums, targets)
    return CompactRows(top, ids, log_p.astype(np.float32), tail, nll.astype(np.float32))


def _draw(mass: Array, rng: np.random.Generator) -> tuple[NDArray[np.uint32], float]:
    """SAMPLES indices drawn in proportion to mass, and its sum.

    Systematic sampling: one random offset, then equal steps through the cumulated mass. Token ids are sorted by
    frequency, more or less, so the draws spread over frequent and rare tokens.
    """
    cumulated = mass.cumsum(dtype=np.float64)
    total = float(cumulated[-1])
    if total < MIN_TAIL:
        return np.zeros(SAMPLES, np.uint32), 0.0
    marks = (np.arange(SAMPLES) + rng.random()) * (total / SAMPLES)
    drawn = np.searchsorted(cumulated, marks, side="right")
    last = int(np.flatnonzero(mass)[-1])  # a mark may round up to the end
    return np.minimum(drawn, last).astype(np.uint32), total


def log_q_of(rows: CompactRows, logits: Array, log_sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities (N, K) of the kept tokens in another model."""
    return np.asarray(np.take_along_axis(logits, rows.ids, axis=-1) - log_sums[:, None], np.float64)


def kl_divergence(p: CompactRows, log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row in nats, (N,), from q's log-probabilities of p's tokens (N, K).

    The mean over rows is nearly unbiased; a single row is as noisy as its tail is heavy. Give it hundreds of
    rows at once: they share the control variate's coefficient.
    """
    log_p = p.log_p.astype(np.float64)
    top = slice(None, p.top)
    exact = kl_rows(log_p[:, top], log_q[:, top])
    tail = p.tail.astype(np.float64)
    q_tail = 1 - np.exp(log_q[:, top]).sum(axis=-1)
    # tail * log(tail / q_tail); where there is no tail, anything finite will do
    shift = np.log(np.maximum(tail, MIN_TAIL)) - np.log(np.maximum(q_tail, MIN_TAIL / 100))
    log_ratio = log_q[:, p.top :] - log_p[:, p.top :] + shift[:, None]  # log t of each sample
    ratio = np.exp(log_ratio)
    centred = ratio - ratio.mean(axis=-1, keepdims=True)
    weight = np.square(tail)[:, None]
    spread = float((weight * np.square(centred)).sum())
    c = float((weight * centred * log_ratio).sum()) / spread if spread else 0.0
    return np.asarray(exact + tail * (shift - log_ratio.mean(axis=-1) + c * (ratio.mean(axis=-1) - 1)))
