"""Report of `edgekv eval`: one versioned JSON document, and lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekv.cache.policies.settings import Eviction
from edgekv.documents import dumps
from edgekv.evaluate.model_under_test import (
    ModelUnderTest,
    cache_nbytes_per_token,
    engine_version,
    model_sha256,
)
from edgekv.evaluate.positions import PositionsResult
from edgekv.evaluate.retrieval import DEPTHS, RetrievalResult
from edgekv.evaluate.ruler.measure import RulerCell, RulerMean, RulerResult, RulerScore
from edgekv.evaluate.tasks import TaskResult, mean_relative_change
from edgekv.evaluate.windows import WindowsResult

FORMAT: Literal["edgekv.eval"] = "edgekv.eval"
VERSION = 1


@dataclass(frozen=True)
class Measured:
    """A model as it was run."""

    file: str
    sha256: str
    backend: str
    engine: str  # version
    weights: str  # "stored", or the type they were dequantized to
    cache_type: str
    cache_nbytes_per_token: float  # as the engine allocated it, all layers
    eviction: Eviction | None  # None: every token stays

    @classmethod
    def of(cls, subject: ModelUnderTest, folder: Path) -> Measured:
        """Describe a subject; opens it once."""
        return cls(
            file=subject.path.name,
            sha256=model_sha256(subject.path),
            backend=subject.backend,
            engine=engine_version(subject.backend),
            weights=subject.recorded_weights,
            cache_type=subject.cache,
            cache_nbytes_per_token=cache_nbytes_per_token(subject, folder),
            eviction=subject.eviction,
        )


@dataclass(frozen=True)
class EvalReport:
    """Everything measured of one model in one run; what was not asked for is None or empty."""

    format: Literal["edgekv.eval"]
    version: int
    edgekv: str
    command: str
    model: Measured
    reference: Measured | None
    windows: WindowsResult | None
    tasks: tuple[TaskResult, ...]
    positions: PositionsResult | None
    retrieval: RetrievalResult | None
    ruler: RulerResult | None

    def to_json(self) -> str:
        """The whole report."""
        return dumps(self, indent=1) + "\n"


def model_line(model: Measured) -> str:
    """The model, its engine and its cache in one line."""
    weights = "" if model.weights == "stored" else f", weights in {model.weights}"
    kept = f", at most {model.eviction.budget:,} tokens by {model.eviction.policy}" if model.eviction else ""
    return (
        f"{model.file}: {model.backend} {model.engine}, cache {model.cache_type}, "
        f"{model.cache_nbytes_per_token:,.0f} bytes per token{kept}{weights}"
    )


def windows_lines(result: WindowsResult) -> list[str]:
    """Perplexity and KL for people."""
    head = (
        f"{result.text}: {result.windows} windows of {result.window}, {result.tokens_scored:,} tokens scored"
    )
    if result.kl is None:
        return [head, f"  perplexity  {result.ppl:.4f}"]
    return [
        head,
        f"  perplexity  {result.ppl:.4f}, reference {result.reference_ppl:.4f}, "
        f"x{result.ppl_ratio:.4f} ± {result.ppl_ratio_se:.4f}",
        f"  KL          {result.kl:.6f} ± {result.kl_se:.6f} nats per token",
        f"  argmax      {result.argmax_agreement:.2%} agree",
    ]


def task_line(result: TaskResult) -> str:
    """One task for people."""
    line = (
        f"{result.task:<10}  {result.questions:>5} questions  accuracy {result.accuracy:.2%} "
        f"± {result.accuracy_se:.2%}"
    )
    if result.chance is not None:
        line += f" (chance {result.chance:.0%}, by sum {result.accuracy_sum:.2%})"
    if result.target_ppl is not None:
        line += f" (perplexity of the last word {result.target_ppl:.2f})"
    if result.relative_change is not None:
        line += (
            f", reference {result.reference_accuracy:.2%}, change {result.relative_change:+.2%} "
            f"± {result.relative_change_se:.2%}"
        )
    return line


def change_line(results: Sequence[TaskResult]) -> str | None:
    """The mean over tasks, if there is a reference and more than one task."""
    mean = mean_relative_change(results)
    if mean is None or len(results) < 2:
        return None
    return f"mean relative change over {len(results)} tasks {mean[0]:+.2%} ± {mean[1]:.2%}"


def positions_lines(result: PositionsResult) -> list[str]:
    """Perplexity by position for people."""
    lines = [f"{result.text}: {result.sequences} sequences of {result.context}"]
    for bucket in result.buckets:
        line = f"  position {bucket.start:>6} to {bucket.stop:>6}  perplexity {bucket.ppl:9.4f}"
        if bucket.ppl_ratio is not None:
            line += f", reference {bucket.reference_ppl:9.4f}, x{bucket.ppl_ratio:.4f} ± {bucket.ppl_ratio_se:.4f}"
        lines.append(f"{line}  ({bucket.tokens_scored:,} tokens)")
    return lines


def retrieval_lines(result: RetrievalResult) -> list[str]:
    """Share of planted lines found, lengths down and depths across."""
    trials = result.cells[0].trials
    lines = [
        f"{result.text}: planted lines found, {trials} trials per cell",
        "  length  depth" + "".join(f"{depth:>17.0%}" for depth in DEPTHS),
    ]
    for first in range(0, len(result.cells), len(DEPTHS)):
        row = result.cells[first : first + len(DEPTHS)]
        cells = [
            f"{cell.found:.0%}"
            + ("" if cell.reference_found is None else f" (ref {cell.reference_found:.0%})")
            for cell in row
        ]
        lines.append(f"  {row[0].length:>6}       " + "".join(f"{cell:>17}" for cell in cells))
    return lines


def ruler_lines(result: RulerResult) -> list[str]:
    """Scores of RULER's tasks for people, and their mean at each length."""
    lines = [f"{result.text}: RULER, {result.samples} samples of each kind and length, seed {result.seed}"]
    for mean in result.means:
        rows: list[tuple[str, RulerCell | RulerMean]] = [
            (cell.kind, cell) for cell in result.cells if cell.length == mean.length
        ]
        for name, row in [*rows, (f"mean of {mean.kinds}", mean)] if mean.kinds > 1 else rows:
            line = f"  {mean.length:>6}  {name:<15}  {_score(row.first)}"
            lines.append(f"{line}; again {_score(row.again)}" if row.again else line)
    return lines


def _score(score: RulerScore) -> str:
    line = f"{score.score:6.1%} ± {score.score_se:5.1%}"
    if score.change is None:
        return line
    return f"{line} (ref {score.reference_score:.1%}, {score.change:+.1%} ± {score.change_se:.1%})"
