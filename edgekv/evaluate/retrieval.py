"""Retrieval of a planted line: whether the cache still holds a fact, at every depth and length.

A line such as "The code of the red door is 48213." is planted in prose and asked for at its end by giving its
beginning once more ("needle in a haystack", github.com/gkamradt/LLMTest_NeedleInAHaystack; asked as a
continuation, so that models without instruction tuning can answer). It is found if greedy decoding writes the
whole number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv.backends.base import Backend
from edgekv.backends.evicting import evict_now, evicts
from edgekv.errors import InputError
from edgekv.evaluate.journal import Identity, measure
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.tasks import ChoiceTokens, continuation_tokens, score_continuation
from edgekv.evaluate.windows import perplexity
from edgekv.evaluate.workers import Run
from edgekv.text.files import read_hashed_text
from edgekv.tokenizer.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the prose that stands before the line
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the context: the prompts' lengths
THINGS = ("red door", "old safe", "north gate", "blue locker", "second vault", "iron chest")
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread evenly however many there are

# By depth: log-probability of the number, and whether greedy decoding writes it.
Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class RetrievalCell:
    """One depth in prompts of one length."""

    length: int  # tokens of the prompt
    depth: float
    trials: int
    found: float  # share of the trials
    number_ppl: float  # perplexity of the whole number: 1 is certainty, 100,000 a guess
    reference_found: float | None
    reference_number_ppl: float | None


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval by length and depth."""

    text: str
    text_sha256: str
    context: int
    cells: tuple[RetrievalCell, ...]


@dataclass(frozen=True)
class Prompt:
    """Prose with a place for the line in it; the line's question and number come at its end."""

    length: int
    prose: list[int]
    line: list[int]
    question: ChoiceTokens


@dataclass(frozen=True)
class Haystack:
    """All prompts: the first trial of each length, then the second, so that more trials go on from fewer."""

    name: str
    sha256: str
    context: int
    trials: int
    prompts: tuple[Prompt, ...]


def make_haystack(path: Path, tokenizer: Tokenizer, context: int, trials: int) -> Haystack:
    """Prompts of an eighth, a quarter, half and all of the context; each trial has other prose.

    Raises:
        InputError: the text is shorter than the context, or the context too short for the line.
    """
    text, sha256 = read_hashed_text(path)
    tokens = tokenizer.encode(text)
    if len(tokens) < context:
        raise InputError(
            f"{path} has {len(tokens)} tokens, not {context}; shorten --ctx-size, or give more text"
        )
    prompts = []
    for trial in range(trials):
        start = int(trial * GOLDEN % 1 * (len(tokens) - context))
        for length in (int(context * share) for share in SHARES):
            prompts.append(_prompt(tokenizer, tokens[start : start + length], length, trial))
    return Haystack(path.name, sha256, context, trials, tuple(prompts))


def _prompt(tokenizer: Tokenizer, prose: list[int], length: int, trial: int) -> Prompt:
    rng = np.random.default_rng((length, trial))
    fact = f"The code of the {rng.choice(THINGS)} is"
    number = f" {rng.integers(10_000, 100_000)}"
    line = tokenizer.encode(f"\n{fact}{number}.\n")
    question = continuation_tokens(tokenizer, f"\n{fact}", number)
    needed = len(line) + len(question.ids)
    if length < 2 * needed:
        raise InputError(
            f"the shortest prompt has {length} tokens, of which line and question are {needed}; retrieval wants "
            f"a --ctx-size of {round(2 * needed / SHARES[0])} or more"
        )
    return Prompt(length, prose[: length - needed], line, question)


def measure_retrieval(haystack: Haystack, subject: ModelUnderTest, run: Run) -> list[Answers]:
    """The answers to each prompt at each depth; raises as journal.measure does."""
    identity: Identity = {"text": haystack.sha256, "context": haystack.context}
    prompts = haystack.prompts
    return measure(
        subject,
        run,
        "retrieval",
        identity,
        haystack.context,
        ask,
        prompts.__getitem__,
        len(prompts),
        lambda done: f"found {np.mean([found for answers in done.values() for _, found in answers]):.0%}",
    )


def retrieval_result(
    haystack: Haystack, answers: Sequence[Answers], reference: Sequence[Answers] | None
) -> RetrievalResult:
    """Share found and perplexity per length and depth, from the answers of a model and of its reference."""
    cells = []
    for i in range(len(SHARES)):
        trials = slice(i, None, len(SHARES))
        for j, depth in enumerate(DEPTHS):
            found, ppl = _mean([answer[j] for answer in answers[trials]])
            base = _mean([answer[j] for answer in reference[trials]]) if reference else (None, None)
            length = haystack.prompts[i].length
            cells.append(RetrievalCell(length, depth, haystack.trials, found, ppl, *base))
    return RetrievalResult(haystack.name, haystack.sha256, haystack.context, tuple(cells))


def ask(backend: Backend, prompt: Prompt) -> Answers:
    """One prompt at each depth, the deepest first: the prose before the line stays in the cache for the next.

    Not in a cache of fixed size, which is cut to its budget before the question: what is left of the prose was
    chosen beside another line.
    """
    answers: Answers = []
    backend.trim(0)
    for depth in reversed(DEPTHS):
        cut = round(depth * len(prompt.prose))
        backend.trim(0 if evicts(backend) else min(cut, backend.n_past))
        if cut > backend.n_past:
            backend.prefill(prompt.prose[backend.n_past : cut])
        backend.prefill(prompt.line + prompt.prose[cut:])
        evict_now(backend)
        answers.append(score_continuation(backend, prompt.question, 0))
    return answers[::-1]


def _mean(answers: Answers) -> tuple[float, float]:
    log_p, found = np.array(answers).T
    return float(found.mean()), perplexity(-float(log_p.mean()))
