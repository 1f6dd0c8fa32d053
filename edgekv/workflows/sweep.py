"""Sweeps: several conversions with several cache types, compared by loss and bytes, as JSON, table and picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekv import __version__
from edgekv.errors import BackendError
from edgekv.evaluate.plot import plot_sweep
from edgekv.evaluate.sweep import Sweep, SweepReport, SweepSpec, markdown_table, read_sweep
from edgekv.files import atomic_path, check_output, file_sha256
from edgekv.progress import Stages, silent
from edgekv.workflows.convert import ConvertRequest, convert_model
from edgekv.workflows.evaluate import Effort
from edgekv.workflows.request import Request

__all__ = ["Effort", "SweepRequest", "read_sweep", "sweep_models"]

SUFFIXES = ("json", "md", "svg")


@dataclass(frozen=True)
class SweepRequest(Request):
    """What to sweep, and where the results go.

    Attributes:
        spec: model, text, cache types and conversions.
        folder: what the spec's paths are relative to.
        output: the files' common name; .json, .md and .svg are added.
        conversions: by name, a request for each conversion of the spec without a file; its output is set here.
        limit: most windows to measure.
    """

    spec: SweepSpec
    folder: Path
    output: Path
    conversions: Mapping[str, ConvertRequest]
    limit: int | None = None
    force: bool = False
    effort: Effort = field(default_factory=Effort)
    command: str = "edgekv.sweep_models"


def sweep_models(
    request: SweepRequest, progress: Stages = silent, say: Callable[[str], None] = lambda line: None
) -> SweepReport:
    """Measure every conversion with every cache type against the original, and write three files.

        from edgekv.workflows.sweep import SweepSpec

        spec = SweepSpec(str(model), str(text), cache_types=("q8_0",), window=128)
        request = edgekv.SweepRequest(spec, folder=text.parent, output=output, conversions={}, limit=1)
        print(edgekv.sweep_models(request).points[0].kl)

    Raises:
        InputError: a model cannot be read, has other tokens, or cannot have one of its cache types.
        OutputError: an output exists without `force`, or cannot be written.
        BackendError: an engine failed; finished results are kept for the next run.
    """
    for suffix in SUFFIXES:
        check_output(_named(request.output, suffix), request.force)
    run = request.effort.run()
    files = _conversion_files(request, run.folder, progress, say)
    sweep = Sweep(request.spec, request.folder, files, run, progress, say)
    report = sweep.run(request.limit, request.command)
    write_sweep(report, request.output, request.force, say)
    return report


def write_sweep(report: SweepReport, base: Path, force: bool, say: Callable[[str], None]) -> None:
    """The report's three files; without matplotlib two, and a line that says how to get the third."""
    for suffix, text in (("json", report.to_json()), ("md", markdown_table(report))):
        with atomic_path(_named(base, suffix), force) as partial:
            partial.write_text(text, encoding="utf-8")
        say(f"wrote {_named(base, suffix)}")
    try:
        with atomic_path(_named(base, "svg"), force) as partial:
            plot_sweep(report, partial)
    except BackendError as error:
        say(f"no picture: {error}, then run this again with --force; nothing is measured twice")
    else:
        say(f"wrote {_named(base, 'svg')}")


def _named(base: Path, suffix: str) -> Path:
    return base.with_name(f"{base.name}.{suffix}")


def _conversion_files(
    request: SweepRequest, cache: Path, progress: Stages, say: Callable[[str], None]
) -> dict[str, Path]:
    """The GGUF of each conversion, made if it does not exist yet."""
    files = {}
    for entry in request.spec.conversion:
        if entry.file is not None:
            files[entry.name] = request.folder / entry.file
            continue
        wanted = request.conversions[entry.name]
        files[entry.name] = cache / f"conversion-{_digest(wanted)}.gguf"
        if not files[entry.name].exists():
            say(f"{entry.name}: edgekv convert {entry.convert}")
            cache.mkdir(parents=True, exist_ok=True)
            convert_model(replace(wanted, output=files[entry.name]), progress)
    return files


def _digest(request: ConvertRequest) -> str:
    """A name for a conversion: from its options, and the contents of every file that they name."""
    options = {name: _identity(value) for name, value in asdict(request).items() if name != "output"}
    return hashlib.sha256(json.dumps([__version__, options], sort_keys=True).encode()).hexdigest()[:16]


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(item) for item in value]
    return file_sha256(value) if isinstance(value, Path) else value
