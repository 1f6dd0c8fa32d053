"""Benchmarks: speed and memory of models and cache types, measured in turns."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.backends.open import Kind, cache_type_name, default_kind
from edgekv.devices.bench.run import run
from edgekv.devices.bench.settings import BenchSettings, Candidate
from edgekv.devices.reporting import compare
from edgekv.devices.reporting.report import Report, dumps
from edgekv.devices.reporting.tables import Source
from edgekv.files import atomic_path
from edgekv.host.load import load_now
from edgekv.progress import Progress, ignore
from edgekv.workflows.request import Request

__all__ = ["BenchRequest", "BenchSettings", "as_terminal", "bench_models", "dumps", "load_now"]


@dataclass(frozen=True)
class BenchRequest(Request):
    """What to measure.

    Attributes:
        models: GGUF files and ONNX folders.
        cache_types: to measure each model with, such as "q8_0", or "q8_0/q4_0" for K and V; by default the
            engine's. An ONNX folder fixes its own.
        backend: by default the one that reads the model's format.
        output: a file for the JSON report; it is opened before the bench runs.
        command: recorded in the report as the command that made it.
    """

    models: tuple[Path, ...]
    cache_types: tuple[str, ...] = ()
    settings: BenchSettings = field(default_factory=BenchSettings)
    backend: Kind | None = None
    output: Path | None = None
    force: bool = False
    command: str = "edgekv.bench_models"


def bench_models(request: BenchRequest, progress: Progress = ignore) -> Report:
    """Measure prefill and decode speed in tokens/s and memory in bytes, for every model with every cache type in turns.

        from edgekv.workflows.bench import BenchSettings

        settings = BenchSettings(depths=(0, 64), n_prompt=16, n_gen=8, repeats=1)
        report = edgekv.bench_models(edgekv.BenchRequest((small, model), ("q4_0",), settings))
        print(report.runs[0].points[0].decode_tps.median)

    Raises:
        InputError: no models, settings out of range, a bad model file, a cache type that does not fit.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: no candidate could be measured at all.
    """
    candidates = [
        Candidate(model, cache_type, kind)
        for model in request.models
        for kind in [request.backend or default_kind(model)]
        for cache_type in _cache_types(model, kind, request.cache_types)
    ]
    with atomic_path(request.output, request.force) if request.output else nullcontext() as partial:
        report = run(candidates, request.settings, progress, request.command)
        if partial is not None:
            partial.write_text(dumps(report), encoding="utf-8")
    return report


def as_terminal(report: Report) -> str:
    """The report's tables, for a terminal."""
    return compare.as_terminal((Source("this run", report),))


def _cache_types(model: Path, kind: Kind, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Cache types to measure a model with: `wanted`, where its engine has a choice."""
    chosen = wanted if wanted and kind != "onnx" else (None,)
    return tuple(cache_type_name(model, kind, cache_type) for cache_type in chosen)
