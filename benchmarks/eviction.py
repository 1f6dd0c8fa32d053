"""RULER's tasks under every policy: rows kept, the question seen or not, with and without CriticalKV.

    python benchmarks/eviction.py MODEL.gguf SMALL.gguf --cache-type f16 --length 4096 --samples 10 \
        -o benchmarks/results/eviction.json --plot docs/eviction.svg

A context runs once: all policies choose of the same rows, all at once, as papers do it, and each answers from a copy
of what it kept; `edgekv eval --budget` measures the cutting in slices. Every task is noted in --cache-dir as soon as
all its settings are answered, so a run that was killed, or ended by --minutes, goes on where it was. The table, in the
form of benchmarks/results/README.md, holds the tasks that are done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import EvictableBackend
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.cache.policies.base import Need, Rows, chosen
from edgekv.cache.policies.merge import merged
from edgekv.cache.policies.named import POLICIES, policy_named
from edgekv.cache.policies.settings import RECENT, SINKS
from edgekv.devices.sensors.machine import probe
from edgekv.errors import UnsupportedError
from edgekv.evaluate.journal import default_folder, open_journal
from edgekv.evaluate.model_under_test import ModelUnderTest, cache_nbytes_per_token, read_tokenizer
from edgekv.evaluate.plot import ContextPoint, plot_contexts
from edgekv.evaluate.ruler.measure import RulerScore, Scores, scores_of, write_answer
from edgekv.evaluate.ruler.tasks import KINDS, AskedTask, TaskMaker
from edgekv.source import Array
from edgekv.text.windows import OTHER_KINDS
from edgekv.tokenizer.tokenizer import Tokenizer

WHOLE = "all rows"
Found = dict[str, list[float]]  # scores of a task's questions by setting


@dataclass(frozen=True)
class Setting:
    """How a context is cut."""

    policy: str
    kept: float
    sees_question: bool

    @property
    def key(self) -> str:
        """Its name in journals."""
        return f"{self.policy} {self.kept:g} {'seen' if self.sees_question else 'blind'}"

    def n_kept(self, task: AskedTask) -> int:
        """Rows that stay of a task's context."""
        return int(self.kept * len(task.context))


def main() -> None:
    """Measure model by model, then write."""
    wanted = arguments()
    wanted.ends = time.monotonic() + 60 * wanted.minutes
    kinds = tuple(wanted.kinds.split(","))
    settings = [
        Setting(policy, kept, seen)
        for kept in map(float, wanted.keep.split(","))
        for policy in wanted.policies.split(",")
        for seen in ((False, True) if wanted.questions == "both" else (wanted.questions == "seen",))
    ]
    rows: list[dict[str, Any]] = []
    points: list[ContextPoint] = []
    for path in wanted.models:
        for cache_type in wanted.cache_type.split(","):
            subject = ModelUnderTest(path, cache_type=cache_type)
            if not (found := scores(subject, wanted, kinds, settings)):
                continue
            nbytes = cache_nbytes_per_token(subject, wanted.cache_dir) * wanted.length
            rows += table(path.stem, cache_type, found, kinds, settings, nbytes)
    for row in rows:
        if row["question"] in ("", "not seen"):
            policy = None if row["policy"] == WHOLE else row["policy"]
            score = row["score"]
            points.append(
                ContextPoint(
                    row["model"], row["cache"], policy, row["nbytes"], score["mean"] / 100, score["se"] / 100
                )
            )
    wanted.output.write_text(document(rows, wanted), encoding="utf-8")
    if wanted.plot:
        title = f"{len(kinds)} of RULER's kinds, {wanted.length:,} tokens, {wanted.samples} samples; question not seen"
        plot_contexts(points, title, wanted.plot)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--cache-type", default="f16", help="with commas")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--keep", default="0.5,0.25", help="shares of the rows")
    parser.add_argument("--questions", choices=("blind", "seen", "both"), default="both")
    parser.add_argument("--text", type=Path, default=OTHER_KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="by default one per big core")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no task begins after this time")
    parser.add_argument("--cache-dir", type=Path, default=default_folder())
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture of it, SVG")
    return parser.parse_args()


def scores(
    subject: ModelUnderTest, wanted: argparse.Namespace, kinds: tuple[str, ...], settings: list[Setting]
) -> list[Found]:
    """Scores of the tasks that are done, sample by sample and all kinds of each, by setting."""
    tokenizer = read_tokenizer(subject.path)
    maker = TaskMaker(wanted.text, tokenizer, wanted.seed)
    tasks = [maker.make(kind, wanted.length, i) for i in range(wanted.samples) for kind in kinds]
    identity = subject.identity() | {
        "text": maker.sha256,
        "seed": wanted.seed,
        "length": wanted.length,
        "kinds": ",".join(kinds),
        "settings": ",".join(setting.key for setting in settings),
    }
    with open_journal(wanted.cache_dir, "eviction", identity) as journal:
        left = [i for i in range(len(tasks)) if i not in journal.done]
        if left and time.monotonic() < wanted.ends:
            backend, possible = opened(subject, wanted.threads, max(task.room for task in tasks), settings)
            try:
                for i in left:
                    if time.monotonic() >= wanted.ends:
                        break
                    journal.add(i, ask(backend, possible, tasks[i], tokenizer))
                    show(subject.path.stem, len(journal.done), len(tasks), list(journal.done.values()))
            finally:
                backend.close()
        return [journal.done[i] for i in sorted(journal.done) if i < len(tasks)]


def opened(
    subject: ModelUnderTest, threads: int | None, n_ctx: int, settings: list[Setting]
) -> tuple[LlamaCppBackend, list[Setting]]:
    """The engine, showing what the policies need, and the settings that it can do; the others are named."""
    needs = frozenset[Need]().union(*(policy_named(setting.policy).needs for setting in settings))
    backend = LlamaCppBackend(
        subject.path,
        n_ctx=n_ctx,
        cache_type=subject.cache,
        n_threads=threads,
        shows=needs,
    )
    possible = []
    for setting in settings:
        try:
            backend.require_evictable(policy_named(setting.policy).needs)
            possible.append(setting)
        except UnsupportedError as error:
            print(f"{setting.key}: {error}", file=sys.stderr)
    backend.require_evictable(
        frozenset[Need]().union(*(policy_named(setting.policy).needs for setting in possible))
    )
    return backend, possible


def show(model: str, done: int, n_tasks: int, found: list[Found]) -> None:
    """Mean scores of the first questions so far, the best first."""
    means = {key: np.mean([scores[key][0] for scores in found]) for key in found[0]}
    best = ", ".join(f"{key} {mean:.0%}" for key, mean in sorted(means.items(), key=lambda item: -item[1]))
    print(f"{time.strftime('%H:%M')} {model} {done}/{n_tasks}: {best}", file=sys.stderr, flush=True)


def ask(
    backend: EvictableBackend, settings: Sequence[Setting], task: AskedTask, tokenizer: Tokenizer
) -> Found:
    """A task's scores in the whole cache, and in what each setting leaves of it."""
    blind = [setting for setting in settings if not setting.sees_question]
    seen = [setting for setting in settings if setting.sees_question]
    backend.trim(0)
    backend.prefill(task.context)
    kept = choices(backend, blind, task)
    context = backend.save()
    backend.prefill(task.questions[0].asked)
    kept |= choices(backend, seen, task)
    asked = backend.save() if seen else context
    found = {WHOLE: answered(backend, task, tokenizer, is_asked=True)}
    for setting in settings:
        backend.load(asked if setting.sees_question else context)
        backend.keep([kept[setting.key]])
        found[setting.key] = answered(backend, task, tokenizer, setting.sees_question)
    return found


def choices(backend: EvictableBackend, settings: Sequence[Setting], task: AskedTask) -> dict[str, Rows]:
    """The rows that each setting keeps of those that are cached: a share of the context's, never of a question's."""
    scores: dict[str, list[Array]] = {setting.key: [] for setting in settings}
    for view in backend.views() if settings else ():
        for setting in settings:
            scores[setting.key].append(policy_named(setting.policy).scores(view, setting.n_kept(task)))
    n_recent = max(RECENT, len(task.questions[0].asked) + 1)
    return {
        setting.key: chosen(merged(scores[setting.key]), setting.n_kept(task), SINKS, n_recent)
        for setting in settings
    }


def answered(backend: EvictableBackend, task: AskedTask, tokenizer: Tokenizer, is_asked: bool) -> Scores:
    """Scores of each question, asked behind what is cached: the context, or that and the first question."""
    texts = []
    for i, question in enumerate(task.questions):
        if i or not is_asked:
            backend.trim(len(task.context))
            assert backend.n_past == len(task.context)
            backend.prefill(question.asked)
        texts.append(write_answer(backend, question, backend.prefill(question.opening), tokenizer))
    return scores_of(task, texts)


def table(
    model: str,
    cache_type: str,
    found: list[Found],
    kinds: tuple[str, ...],
    settings: list[Setting],
    nbytes: float,
) -> list[dict[str, Any]]:
    """A row for all of the cache, and one for each setting that was measured, of the tasks that are done."""
    n_kinds = min(len(kinds), len(found))

    def mean(key: str, question: int, kind_numbers: range) -> RulerScore:
        each = [found[i :: len(kinds)] for i in kind_numbers if len(found[i][WHOLE]) > question]
        return RulerScore.mean(
            [
                RulerScore.of(
                    np.array([scores[key][question] for scores in of_kind]),
                    np.array([scores[WHOLE][question] for scores in of_kind]),
                )
                for of_kind in each
            ]
        )

    def row(key: str, setting: Setting | None) -> dict[str, Any]:
        first = mean(key, 0, range(n_kinds))
        has_second = any(len(scores[WHOLE]) > 1 for scores in found)
        second = mean(key, 1, range(n_kinds)) if has_second else None
        return {
            "model": model,
            "cache": cache_type,
            "policy": setting.policy if setting else WHOLE,
            "kept": setting.kept if setting else 1.0,
            "question": ("seen" if setting.sees_question else "not seen") if setting else "",
            "score": percent(first.score, first.score_se),
            "change": percent(first.change, first.change_se) if setting else None,
            "again": percent(second.score, second.score_se) if second else None,
            "nbytes": round(nbytes * (setting.kept if setting else 1)),
            "kinds": {
                kind: round(100 * mean(key, 0, range(i, i + 1)).score, 1)
                for i, kind in enumerate(kinds[:n_kinds])
            },
            "tasks": len(found),
        }

    measured = [setting for setting in settings if setting.key in found[0]]
    return [row(WHOLE, None), *(row(setting.key, setting) for setting in measured)]


def percent(value: float | None, error: float | None) -> dict[str, float]:
    """A figure as result files have it."""
    assert value is not None
    assert error is not None
    return {"mean": round(100 * value, 1), "se": round(100 * error, 1)}


def document(rows: list[dict[str, Any]], wanted: argparse.Namespace) -> str:
    """The result file."""
    columns = {
        "model": "model",
        "cache": "cache",
        "policy": "policy",
        "kept": "rows kept",
        "question": "question",
        "score": "mean score, %",
        "change": "change",
        "again": "second question, %",
        "nbytes": "bytes per context",
    }
    machine = probe()[0]
    result = {
        "title": f"RULER's kinds at {wanted.length:,} tokens by cache policy",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "machine": machine.soc or machine.board,
        "versions": {"llama-cpp-python": version("llama-cpp-python")},
        "command": [shlex.join(["python", *sys.argv])],
        "columns": [{"key": key, "title": title} for key, title in columns.items()],
        "rows": rows,
        "notes": f"Up to {wanted.samples} samples of each of {wanted.kinds}, `tasks` in all; seed {wanted.seed}; the "
        "kinds' means in `kinds`. Rows are cut at once when the whole context is in the cache. Changes are from the "
        "whole cache on the same tasks.",
    }
    return json.dumps(result, indent=2) + "\n"


if __name__ == "__main__":
    main()
