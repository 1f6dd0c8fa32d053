"""Evaluation of one model: every measurement that was asked for, of the model and of its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from edgekv import __version__
from edgekv.errors import InputError
from edgekv.evaluate import report, retrieval
from edgekv.evaluate.model_under_test import (
    ModelUnderTest,
    beyond_training,
    read_tokenizer,
    require_same_tokens,
    trained_context,
)
from edgekv.evaluate.positions import PositionsResult, measure_positions, positions_result
from edgekv.evaluate.reference import open_reference
from edgekv.evaluate.ruler.measure import RulerResult, RulerTasks, measure_ruler, ruler_result
from edgekv.evaluate.ruler.tasks import KINDS, TaskMaker
from edgekv.evaluate.task_formats import Task, read_task
from edgekv.evaluate.tasks import TaskResult, measure_task, task_result
from edgekv.evaluate.windows import WindowsResult, measure_windows
from edgekv.evaluate.workers import Run
from edgekv.progress import Stages
from edgekv.text.scored import Text, cut_windows

T = TypeVar("T")


@dataclass(frozen=True)
class Measurements:
    """What to measure.

    Attributes:
        scored: predictions at the end of a window that count; by default those of its second half.
        limit: caps windows, and questions per task.
        sequences: of the full context, for perplexity by position.
        trials: of each length for retrieval, of each kind and length for RULER.
        kinds: of RULER's tasks; by default all. They are drawn from `seed`.
        lengths: of RULER's prompts in tokens; by default the context.
        see_question: RULER's questions come before the cache is cut to its budget, not behind it.
    """

    text: Path | None = None
    window: int = 1024
    scored: int | None = None
    tasks: tuple[tuple[str, Path], ...] = ()
    positions: Path | None = None
    retrieval: Path | None = None
    ruler: Path | None = None
    context: int | None = None
    limit: int | None = None
    sequences: int = 8
    trials: int = 4
    kinds: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    seed: int = 0
    see_question: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return not (self.text or self.tasks or self.positions or self.retrieval or self.ruler)


class Evaluation:
    """Runs measurements of one subject.

    Args:
        progress: makes a progress line for a stage of this name.
        say: is given lines for people as soon as they are known.
    """

    def __init__(
        self,
        subject: ModelUnderTest,
        reference: ModelUnderTest | None,
        run: Run,
        progress: Stages,
        say: Callable[[str], None],
    ) -> None:
        if reference is not None:
            require_same_tokens(subject.path, reference.path)
        self._subject, self._reference, self._run = subject, reference, run
        self._progress, self._say = progress, say
        self._tokenizer = read_tokenizer(subject.path)

    def run(self, wanted: Measurements, command: str) -> report.EvalReport:
        """Measure all that is asked for; every input is read before the first model runs.

        Raises:
            InputError: nothing is asked for, or an input cannot be used.
            BackendError: an engine failed.
        """
        if wanted.is_empty:
            raise InputError("say what to measure: --text FILE or --task NAME=FILE")
        path, limit, tokenizer = self._subject.path, wanted.limit, self._tokenizer
        context = wanted.context or trained_context(path)
        text = (
            cut_windows(wanted.text, tokenizer, wanted.window, limit, scored=wanted.scored)
            if wanted.text
            else None
        )
        tasks = [read_task(name, file, limit) for name, file in wanted.tasks]
        long = (
            cut_windows(wanted.positions, tokenizer, context, wanted.sequences, "--ctx-size")
            if wanted.positions
            else None
        )
        haystack = (
            retrieval.make_haystack(wanted.retrieval, tokenizer, context, wanted.trials)
            if wanted.retrieval
            else None
        )
        ruler = self._ruler_tasks(wanted, context) if wanted.ruler else None
        model = report.Measured.of(self._subject, self._run.folder)
        self._say(report.model_line(model))
        longest = max(text.length if text else 0, context if long or haystack else 0)
        longest = max([longest, *(tasks.length for tasks in ruler[1])] if ruler else [longest])
        if note := beyond_training(path, longest):
            self._say(note)
        return report.EvalReport(
            report.FORMAT,
            report.VERSION,
            __version__,
            command,
            model,
            report.Measured.of(self._reference, self._run.folder) if self._reference else None,
            windows=self._windows(text) if text else None,
            tasks=self._tasks(tasks),
            positions=self._positions(long) if long else None,
            retrieval=self._retrieval(haystack) if haystack else None,
            ruler=self._ruler(*ruler, wanted.see_question) if ruler else None,
        )

    def _windows(self, text: Text) -> WindowsResult:
        if self._reference is None:
            result = measure_windows(self._subject, text, None, self._stage("windows"))
        else:
            fresh = self._run.fresh
            with open_reference(self._reference, text, len(self._tokenizer), self._run.folder, fresh) as held:
                held.fill(self._stage("reference"))
                result = measure_windows(self._subject, text, held, self._stage("windows"))
        self._say("\n".join(report.windows_lines(result)))
        return result

    def _tasks(self, tasks: Sequence[Task]) -> tuple[TaskResult, ...]:
        results = []
        for task in tasks:
            measure = partial(measure_task, self._tokenizer, task)
            results.append(task_result(task, *self._both(task.name, measure)))
            self._say(report.task_line(results[-1]))
        if line := report.change_line(results):
            self._say(line)
        return tuple(results)

    def _positions(self, text: Text) -> PositionsResult:
        result = positions_result(text, *self._both("positions", partial(measure_positions, text)))
        self._say("\n".join(report.positions_lines(result)))
        return result

    def _retrieval(self, haystack: retrieval.Haystack) -> retrieval.RetrievalResult:
        result = retrieval.retrieval_result(
            haystack, *self._both("retrieval", partial(retrieval.measure_retrieval, haystack))
        )
        self._say("\n".join(report.retrieval_lines(result)))
        return result

    def _ruler_tasks(self, wanted: Measurements, context: int) -> tuple[TaskMaker, list[RulerTasks]]:
        assert wanted.ruler is not None
        kinds = wanted.kinds or tuple(KINDS)
        if unknown := set(kinds).difference(KINDS):
            raise InputError(f"{min(unknown)!r} is no kind of task; there are {', '.join(KINDS)}")
        maker = TaskMaker(wanted.ruler, self._tokenizer, wanted.seed)
        lengths = wanted.lengths or (context,)
        return maker, [RulerTasks.make(maker, kinds, length, wanted.trials) for length in lengths]

    def _ruler(self, maker: TaskMaker, lengths: Sequence[RulerTasks], sees_question: bool) -> RulerResult:
        scores, reference = [], []
        for tasks in lengths:
            own, base = self._both(
                f"ruler {tasks.length}", partial(measure_ruler, tasks, maker, sees_question)
            )
            scores.append(own)
            reference += [base] if base else []
        result = ruler_result(maker, lengths, scores, reference or None)
        self._say("\n".join(report.ruler_lines(result)))
        return result

    def _both(self, what: str, measure: Callable[[ModelUnderTest, Run], T]) -> tuple[T, T | None]:
        """The measurement of the subject, and of the reference if there is one."""
        reference = measure(self._reference, self._stage(f"{what}, reference")) if self._reference else None
        return measure(self._subject, self._stage(what)), reference

    def _stage(self, name: str) -> Run:
        return replace(self._run, progress=self._progress(name))
