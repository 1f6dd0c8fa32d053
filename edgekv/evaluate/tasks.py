"""Zero-shot accuracy by the probability of each choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import Backend
from edgekv.errors import InputError
from edgekv.evaluate.journal import measure
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.task_formats import Question, Task
from edgekv.evaluate.top_and_tail import log_sum_exp, target_nll
from edgekv.evaluate.windows import perplexity, standard_error
from edgekv.evaluate.workers import Run
from edgekv.source import Array
from edgekv.tokenizer.language import opening_tokens
from edgekv.tokenizer.tokenizer import Tokenizer

Scores = list[tuple[float, bool]]  # of each choice: log-probability, and whether greedy decoding writes it


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task; `_se` are standard errors of the mean over questions.

    `accuracy` picks the choice with the highest log-probability per character, `accuracy_sum` that with the
    highest sum. With one choice, as in LAMBADA, both count the questions where greedy decoding writes it.
    """

    task: str
    file: str
    file_sha256: str
    questions: int
    accuracy: float
    accuracy_se: float
    accuracy_sum: float
    chance: float | None  # None for LAMBADA
    target_ppl: float | None  # LAMBADA: perplexity of the last word
    reference_accuracy: float | None
    relative_change: float | None  # (accuracy - reference) / reference
    relative_change_se: float | None  # over the same questions, so what both get right does not count


@dataclass(frozen=True)
class ChoiceTokens:
    """A context and its continuation as tokens; those from `first` on are scored."""

    ids: list[int]
    first: int


def measure_task(tokenizer: Tokenizer, task: Task, subject: ModelUnderTest, run: Run) -> list[Scores]:
    """Score every choice of every question; raises as journal.measure does."""
    start = opening_tokens(tokenizer)
    tokens = [
        [continuation_tokens(tokenizer, c.context, c.continuation, start) for c in question.choices]
        for question in task.questions
    ]
    found: list[Scores] = measure(
        subject,
        run,
        "task",
        {"task": task.name, "file": task.sha256},
        max(len(choice.ids) for choices in tokens for choice in choices),
        score_choices,
        tokens.__getitem__,
        len(tokens),
        lambda done: _summary(task, done),
    )
    return found


def task_result(task: Task, scores: Sequence[Scores], reference: Sequence[Scores] | None) -> TaskResult:
    """Accuracy from the scores of a model, and its change from those of the reference."""
    right = _right(task.questions, scores)
    single = all(len(question.choices) == 1 for question in task.questions)
    against = _right(task.questions, reference) if reference else None
    change, change_se = _relative_change(right, against) if against is not None else (None, None)
    return TaskResult(
        task=task.name,
        file=task.file,
        file_sha256=task.sha256,
        questions=len(right),
        accuracy=float(right.mean()),
        accuracy_se=standard_error(right),
        accuracy_sum=float(_right(task.questions, scores, by_length=False).mean()),
        chance=None if single else float(np.mean([1 / len(q.choices) for q in task.questions])),
        target_ppl=perplexity(-float(np.mean([s[0][0] for s in scores]))) if single else None,
        reference_accuracy=float(against.mean()) if against is not None else None,
        relative_change=change,
        relative_change_se=change_se,
    )


def mean_relative_change(results: Sequence[TaskResult]) -> tuple[float, float] | None:
    """Mean over tasks of the relative change, and its standard error; None without a reference."""
    changes = [result.relative_change for result in results if result.relative_change is not None]
    errors = [result.relative_change_se for result in results if result.relative_change_se is not None]
    if not changes:
        return None
    return sum(changes) / len(changes), math.hypot(*errors) / len(errors)


def continuation_tokens(
    tokenizer: Tokenizer, context: str, continuation: str, start: Sequence[int] = ()
) -> ChoiceTokens:
    """A context behind the tokens `start`, and its continuation.

    Tokens may join across the seam: scored are as many as the whole has more than the context.
    """
    before = [*start, *tokenizer.encode(context)]
    whole = [*start, *tokenizer.encode(context + continuation)]
    first = min(len(before), len(whole) - 1)
    if first < 1:
        raise InputError(f"there is nothing before {continuation!r} that could predict it")
    return ChoiceTokens(whole, first)


def score_choices(backend: Backend, choices: Sequence[ChoiceTokens]) -> Scores:
    """Each choice's score; what all begin with is run once."""
    shared = _shared_prefix(choices)
    backend.trim(0)
    after_shared = backend.prefill(choices[0].ids[:shared]) if shared else None
    scores: Scores = []
    for choice in choices:
        backend.trim(shared)
        scores.append(score_continuation(backend, choice, backend.n_past, after_shared))
    return scores


def score_continuation(
    backend: Backend, choice: ChoiceTokens, cached: int, after_cached: Array | None = None
) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding writes it. Its last token is not run.

    Args:
        cached: how many of its tokens are in the cache already.
        after_cached: the logits (vocab,) behind them, needed if they are the whole context.

    Raises:
        BackendError: the engine failed, or gave logits that are not finite.
    """
    context = choice.ids[cached : choice.first]
    head = backend.prefill(context) if context else after_cached
    assert head is not None
    rest = choice.ids[choice.first : -1]
    logits = np.concatenate([head[None], backend.prefill_all(rest)]) if rest else head[None]
    targets = np.asarray(choice.ids[choice.first :], np.int64)
    log_sums, best = log_sum_exp(logits)
    return -float(target_nll(logits, log_sums, targets).sum()), bool((best == targets).all())


def _shared_prefix(choices: Sequence[ChoiceTokens]) -> int:
    """How many tokens all choices begin with, none of them scored."""
    shared = 0
    for column in zip(*(choice.ids[: choice.first] for choice in choices), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _right(
    questions: Sequence[Question], scores: Sequence[Scores], by_length: bool = True
) -> NDArray[np.float64]:
    """1 for each question answered rightly, else 0."""
    right = np.empty(len(scores))
    for i, (question, choices) in enumerate(zip(questions, scores, strict=True)):
        if len(choices) == 1:
            right[i] = choices[0][1]
            continue
        lengths = [choice.length if by_length else 1 for choice in question.choices]
        right[i] = int(
            np.argmax([score[0] / n for score, n in zip(choices, lengths, strict=True)]) == question.gold
        )
    return right


def _relative_change(
    right: NDArray[np.float64], reference: NDArray[np.float64]
) -> tuple[float, float] | tuple[None, None]:
    """(mean - reference mean) / reference mean and its standard error, question by question (delta method)."""
    base = float(reference.mean())
    if base == 0:
        return None, None
    ratio = float(right.mean()) / base
    return ratio - 1, standard_error(right - ratio * reference) / base


def _summary(task: Task, scores: dict[int, Scores]) -> str:
    right = _right([task.questions[i] for i in scores], list(scores.values()))
    return f"accuracy {right.mean():.2%}"
