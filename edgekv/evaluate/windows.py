"""Perplexity, KL divergence and argmax agreement over windows of a text.

The text is cut into windows of `length` tokens, each starts with an empty cache and no special token, and the
predictions made in its second half are scored: positions length/2 to length - 2, each knowing at least length/2
tokens before it. That is the protocol of llama.cpp's llama-perplexity, but for its first token, which
llama-perplexity replaces by BOS in models that want one. A remainder shorter than a window is left out.

Or as many predictions at the end of each window as are asked for. A cache of fixed size is cut before the first of
them, and the reference keeps every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import Backend
from edgekv.evaluate.journal import measure
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.reference import Reference
from edgekv.evaluate.top_and_tail import CompactRows, kl_divergence, log_q_of, log_sum_exp, target_nll
from edgekv.evaluate.workers import Run
from edgekv.text.scored import Text, scored_logits

Sums = dict[str, float]  # over one window's scored predictions
WindowItem = tuple[list[int], int, CompactRows | None]


@dataclass(frozen=True)
class WindowsResult:
    """Over all scored predictions. `_se` are standard errors of the mean, from the windows as independent draws
    (0 with one window). The reference's fields are None without a reference."""

    text: str
    text_sha256: str
    window: int
    windows: int
    tokens_scored: int
    ppl: float
    reference_ppl: float | None
    ppl_ratio: float | None
    ppl_ratio_se: float | None
    kl: float | None  # nats per token, KL(reference || candidate)
    kl_se: float | None
    argmax_agreement: float | None


def measure_windows(
    subject: ModelUnderTest, text: Text, reference: Reference | None, run: Run
) -> WindowsResult:
    """Score every window; `reference` must have them all (Reference.fill). Raises as journal.measure does."""

    def item(i: int) -> WindowItem:
        return text.window(i), text.first, reference.read(i) if reference else None

    scores = measure(
        subject,
        run,
        "windows",
        text.identity() | {"reference": reference.key if reference else None},
        text.length,
        score_window,
        item,
        len(text.windows),
        lambda done: _summary(text, list(done.values())),
    )
    return _result(text, scores)


def score_window(backend: Backend, item: WindowItem) -> Sums:
    """One window: its tokens, the position of the first scored prediction, the reference's rows."""
    tokens, first, reference = item
    nll = 0.0
    best, log_q = [], []
    at = 0
    for targets, logits in scored_logits(backend, tokens, first):
        log_sums, argmax = log_sum_exp(logits)
        nll += float(target_nll(logits, log_sums, targets).sum())
        if reference is not None:
            best.append(argmax)
            log_q.append(log_q_of(reference.rows(at, at + len(logits)), logits, log_sums))
        at += len(logits)
    if reference is None:
        return {"nll": nll}
    return {
        "nll": nll,
        "reference_nll": float(reference.nll.sum(dtype=np.float64)),
        "kl": float(kl_divergence(reference, np.concatenate(log_q)).sum()),
        "agree": int((np.concatenate(best) == reference.argmax).sum()),
    }


def _result(text: Text, values: list[Sums]) -> WindowsResult:
    sums = {key: np.array([window[key] for window in values]) for key in values[0]}
    scored = len(values) * text.n_scored
    means = {key: float(array.sum()) / scored for key, array in sums.items()}
    against = "kl" in sums
    ratio = perplexity(means["nll"] - means["reference_nll"]) if against else None
    return WindowsResult(
        text=text.name,
        text_sha256=text.sha256,
        window=text.length,
        windows=len(values),
        tokens_scored=scored,
        ppl=perplexity(means["nll"]),
        reference_ppl=perplexity(means["reference_nll"]) if against else None,
        ppl_ratio=ratio,
        ppl_ratio_se=ratio * standard_error(sums["nll"] - sums["reference_nll"]) / text.n_scored
        if ratio
        else None,
        kl=means["kl"] if against else None,
        kl_se=standard_error(sums["kl"]) / text.n_scored if against else None,
        argmax_agreement=means["agree"] if against else None,
    )


def perplexity(nll: float) -> float:
    """exp of a mean loss in nats, kept finite for broken models."""
    return math.exp(min(nll, 700.0))


def standard_error(draws: NDArray[np.float64]) -> float:
    """Standard error of the mean of independent draws (n,); 0 for a single one."""
    return float(draws.std(ddof=1)) / math.sqrt(len(draws)) if len(draws) > 1 else 0.0


def _summary(text: Text, values: list[Sums]) -> str:
    result = _result(text, values)
    line = f"PPL {result.ppl:.3f}"
    if result.kl is None:
        return line
    return f"{line} (x{result.ppl_ratio:.4f})  KL {result.kl:.5f}  argmax {result.argmax_agreement:.2%}"
