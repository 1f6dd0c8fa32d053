"""Comparison of two models or two engines: KL, logit error and argmax agreement on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekv.backends.base import Backend
from edgekv.progress import ignore
from edgekv.reference.ops import kl_rows, log_softmax
from edgekv.reference.sample import write_on

CHUNK = 64  # tokens whose logits are held at once, of each side


@dataclass(frozen=True)
class Comparison:
    """B against A. kl: mean, its standard error and max of KL(A || B) over positions, in nats. Perplexities are of the
    tokens given."""

    tokens: int
    kl: float
    kl_se: float
    kl_max: float
    max_logit_error: float
    argmax_agreement: float
    ppl_a: float
    ppl_b: float
    kernel: str = "stock"  # "edgekv" where one of them ran in llama.cpp with EdgeKV's attention


def sample_tokens(model: Backend, n_tokens: int, seed: int) -> list[int]:
    """Tokens that a model samples from itself, so that a check needs no text; its cache is left empty."""
    rng = np.random.default_rng(seed)
    prompt = np.array([[rng.integers(model.n_vocab)]])
    (tokens,) = write_on(lambda last, _: model.decode(int(last[0]))[None], prompt, n_tokens, rng, ignore)
    model.trim(0)
    return [int(token) for token in tokens]


def compare(
    a: Backend, b: Backend, tokens: Sequence[int], progress: Callable[[int, int], None]
) -> Comparison:
    """Feed both the same tokens, a few at a time, and compare what they predict at every position.

    Raises:
        BackendError: an engine failed, or the tokens do not fit its context.
    """
    kl: list[float] = []
    error, agree, nll_a, nll_b = 0.0, 0, 0.0, 0.0
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        logits_a, logits_b = a.prefill_all(chunk), b.prefill_all(chunk)
        error = max(error, float(np.abs(logits_a - logits_b).max()))
        agree += int((logits_a.argmax(-1) == logits_b.argmax(-1)).sum())
        log_a, log_b = log_softmax(logits_a), log_softmax(logits_b)
        kl += kl_rows(log_a, log_b).tolist()
        following = np.asarray(tokens[start + 1 : start + CHUNK + 1], np.int64)
        rows = np.arange(len(following))
        nll_a -= float(log_a[rows, following].sum(dtype=np.float64))
        nll_b -= float(log_b[rows, following].sum(dtype=np.float64))
        progress(min(start + CHUNK, len(tokens)), len(tokens))
    predicted = max(1, len(tokens) - 1)
    return Comparison(
        tokens=len(tokens),
        kl=float(np.mean(kl)),
        kl_se=float(np.std(kl, ddof=1) / np.sqrt(len(kl))),
        kl_max=float(np.max(kl)),
        max_logit_error=error,
        argmax_agreement=agree / len(tokens),
        ppl_a=float(np.exp(nll_a / predicted)),
        kernel="edgekv" if "edgekv" in (a.kernel, b.kernel) else "stock",
        ppl_b=float(np.exp(nll_b / predicted)),
    )
