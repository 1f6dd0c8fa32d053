"""Tasks asked of a model, and its scores with their standard errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import Backend
from edgekv.backends.evicting import evict_now
from edgekv.cache.policies.settings import Eviction
from edgekv.errors import InputError
from edgekv.evaluate.journal import Identity, measure
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.ruler.tasks import AskedQuestion, AskedTask, TaskMaker, score
from edgekv.evaluate.windows import standard_error
from edgekv.evaluate.workers import Run
from edgekv.source import Array
from edgekv.tokenizer.tokenizer import Tokenizer

Scores = list[float]  # of a task's questions, 0 to 1
Texts = list[str]  # what the model wrote


@dataclass(frozen=True)
class RulerScore:
    """A mean score, 0 to 1, with its standard error; and its change from the reference's on the same tasks."""

    score: float
    score_se: float
    reference_score: float | None
    change: float | None
    change_se: float | None

    @classmethod
    def of(cls, scores: NDArray[np.float64], reference: NDArray[np.float64] | None) -> RulerScore:
        """From the scores (n,) of tasks."""
        mean, error = float(scores.mean()), standard_error(scores)
        if reference is None:
            return cls(mean, error, None, None, None)
        change = scores - reference
        return cls(mean, error, float(reference.mean()), float(change.mean()), standard_error(change))

    @classmethod
    def mean(cls, scores: Sequence[RulerScore]) -> RulerScore:
        """The mean over kinds, each counted alike."""
        n = len(scores)
        references = [s.reference_score for s in scores if s.reference_score is not None]
        changes = [
            (s.change, s.change_se) for s in scores if s.change is not None and s.change_se is not None
        ]
        return cls(
            sum(s.score for s in scores) / n,
            math.hypot(*(s.score_se for s in scores)) / n,
            sum(references) / n if references else None,
            sum(change for change, _ in changes) / n if changes else None,
            math.hypot(*(error for _, error in changes)) / n if changes else None,
        )


@dataclass(frozen=True)
class RulerCell:
    """One kind at one length; `again` is the second question about the same context, where the kind has one."""

    kind: str
    length: int  # tokens up to where the answer begins
    first: RulerScore
    again: RulerScore | None


@dataclass(frozen=True)
class RulerMean:
    """The mean over the kinds of one length."""

    length: int
    kinds: int
    first: RulerScore
    again: RulerScore | None


@dataclass(frozen=True)
class RulerResult:
    """Scores by kind and length."""

    text: str
    text_sha256: str
    seed: int
    samples: int
    cells: tuple[RulerCell, ...]
    means: tuple[RulerMean, ...]


@dataclass(frozen=True)
class RulerTasks:
    """The tasks of one length: sample by sample and all kinds of each, so that more samples go on from fewer."""

    length: int
    kinds: tuple[str, ...]
    tasks: tuple[AskedTask, ...]

    @classmethod
    def make(cls, maker: TaskMaker, kinds: tuple[str, ...], length: int, samples: int) -> RulerTasks:
        """Raises as TaskMaker.make does."""
        tasks = (maker.make(kind, length, i) for i in range(samples) for kind in kinds)
        return cls(length, kinds, tuple(tasks))


def measure_ruler(
    tasks: RulerTasks, maker: TaskMaker, sees_question: bool, subject: ModelUnderTest, run: Run
) -> list[Scores]:
    """The scores of every task; raises as journal.measure does.

    Args:
        sees_question: evict behind the first question, not before it.
    """
    identity: Identity = {
        "text": maker.sha256,
        "seed": maker.seed,
        "length": tasks.length,
        "kinds": ",".join(tasks.kinds),
    }
    if subject.eviction:
        identity = {**identity, "evicts": "behind the question" if sees_question else "before the question"}
        subject = replace(subject, eviction=undisturbed(subject.eviction, tasks.tasks))
    found: list[tuple[Scores, Texts]] = measure(
        subject,
        run,
        "ruler",
        identity,
        max(task.room for task in tasks.tasks),
        answer_task,
        lambda i: (tasks.tasks[i], subject.path, sees_question),
        len(tasks.tasks),
        lambda done: f"score {np.mean([scores[0] for scores, _ in done.values()]):.1%}",
    )
    return [scores for scores, _ in found]


def undisturbed(eviction: Eviction, tasks: Sequence[AskedTask]) -> Eviction:
    """An eviction that leaves questions alone: nothing leaves while they are answered, or of the first itself."""
    questions = [question for task in tasks for question in task.questions]
    return msgspec.structs.replace(
        eviction,
        every=max(eviction.every, *(len(q.tokens) + q.limit + 1 for q in questions)),
        recent=max(eviction.recent, *(len(q.asked) + 1 for q in questions)),
    )


def ruler_result(
    maker: TaskMaker,
    lengths: Sequence[RulerTasks],
    scores: Sequence[Sequence[Scores]],
    reference: Sequence[Sequence[Scores]] | None,
) -> RulerResult:
    """Scores per kind and length, from those of a model and of its reference, by length and task."""
    cells, means = [], []
    samples = len(lengths[0].tasks) // len(lengths[0].kinds)
    for at, tasks in enumerate(lengths):
        here = []
        for i, kind in enumerate(tasks.kinds):
            own = np.array(scores[at][i :: len(tasks.kinds)], np.float64)  # (samples, questions)
            base = np.array(reference[at][i :: len(tasks.kinds)], np.float64) if reference else None
            of = [
                RulerScore.of(own[:, q], base[:, q] if base is not None else None)
                for q in range(own.shape[1])
            ]
            here.append(RulerCell(kind, tasks.length, of[0], of[1] if len(of) > 1 else None))
        again = [cell.again for cell in here if cell.again]
        means.append(
            RulerMean(
                tasks.length,
                len(here),
                RulerScore.mean([cell.first for cell in here]),
                RulerScore.mean(again) if again else None,
            )
        )
        cells += here
    return RulerResult(maker.source.name, maker.sha256, maker.seed, samples, tuple(cells), tuple(means))


def answer_task(backend: Backend, item: tuple[AskedTask, Path, bool]) -> tuple[Scores, Texts]:
    """A task, the model whose vocabulary it is in, and whether a policy sees the question: scores and answers."""
    task, path, sees_question = item
    backend.trim(0)
    backend.prefill(task.context)
    texts = answers(backend, task, _tokenizer(path), sees_question)
    return scores_of(task, texts), texts


def answers(backend: Backend, task: AskedTask, tokenizer: Tokenizer, sees_question: bool) -> Texts:
    """Each question asked behind the context, which is in the cache, and answered by greedy decoding.

    A cache of fixed size is cut first, or, if a policy may see it, behind the first question. The second finds what
    was kept then.

    Raises:
        InputError: the budget is so small that not even the first question stayed.
        BackendError: the engine failed.
    """
    if not sees_question:
        evict_now(backend)
    kept = len(task.context)
    texts = []
    for i, question in enumerate(task.questions):
        backend.trim(kept)
        if backend.n_past != kept:
            raise InputError(
                f"{task.kind}: a question of {len(task.questions[0].asked)} tokens does not stay in the cache whole; "
                "take a larger --budget, or leave --see-question out"
            )
        backend.prefill(question.asked)
        if sees_question and i == 0:
            evict_now(backend)
        texts.append(write_answer(backend, question, backend.prefill(question.opening), tokenizer))
    return texts


def scores_of(task: AskedTask, texts: Texts) -> Scores:
    """The score of each answer."""
    return [score(task.match, text, q.answers) for text, q in zip(texts, task.questions, strict=True)]


def write_answer(backend: Backend, question: AskedQuestion, logits: Array, tokenizer: Tokenizer) -> str:
    """What greedy decoding writes, until it ends, is as long as it may be, or has all answers: no score is higher."""
    ids: list[int] = []
    text = ""
    while True:
        token = int(logits.argmax())
        if token in tokenizer.stop_ids:
            return text
        ids.append(token)
        text = tokenizer.decode(ids)
        if len(ids) == question.limit or score("all", text, question.answers) == 1:
            return text
        logits = backend.decode(token)


@functools.lru_cache(1)
def _tokenizer(path: Path) -> Tokenizer:
    """Read once by each worker: sent along with every task it would cost more than the task."""
    return read_tokenizer(path)
