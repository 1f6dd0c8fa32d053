"""`edgekv eval --sweep`: conversions are made, points measured, and three files written."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekv.evaluate.sweep import Conversion, SweepReport, SweepSpec
    from edgekv.evaluate.workers import Run


def run_sweep(
    path: Path, output: Path | None, limit: int | None, force: bool, as_json: bool, run: Run
) -> None:
    """Measure the sweep in `path` and write <output>.json, .md and .svg, by default named after `path`."""
    import json

    from edgekv.cli.common.output import command_line
    from edgekv.cli.common.progress import ProgressLine
    from edgekv.documents import encode
    from edgekv.evaluate.sweep import Sweep, read_sweep
    from edgekv.files import check_output

    spec = read_sweep(path)
    base = output or path.with_suffix("")
    for suffix in ("json", "md", "svg"):
        check_output(_named(base, suffix), force)

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    files = conversion_files(spec, path.parent, run.folder, say)
    report = Sweep(spec, path.parent, files, run, ProgressLine, say).run(limit, command_line())
    write_sweep(report, base, force, say)
    if as_json:
        click.echo(json.dumps(encode(report), indent=1, allow_nan=False))


def write_sweep(report: SweepReport, base: Path, force: bool, say: Any) -> None:
    """The report's three files; without matplotlib two, and a line that says how to get the third."""
    import json

    from edgekv.documents import encode
    from edgekv.errors import BackendError
    from edgekv.evaluate.plot import plot_sweep
    from edgekv.evaluate.sweep import markdown_table
    from edgekv.files import atomic_path

    for suffix, text in (
        ("json", json.dumps(encode(report), indent=1, allow_nan=False) + "\n"),
        ("md", markdown_table(report)),
    ):
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


def conversion_files(spec: SweepSpec, folder: Path, cache: Path, say: Any) -> Mapping[str, Path]:
    """The GGUF of each conversion. All options are read before the first one is made."""
    made = {
        entry.name: (entry, _conversion(entry, folder / spec.model, folder, cache, spec.weights))
        for entry in spec.conversion
    }
    for name, (entry, (context, path)) in made.items():
        if context is not None and not path.exists():
            say(f"{name}: edgekv convert {entry.convert}")
            _convert(context)
    return {name: path for name, (_, (_, path)) in made.items()}


def _conversion(
    entry: Conversion, model: Path, folder: Path, cache: Path, weights: str
) -> tuple[click.Context | None, Path]:
    """A conversion's file, and if it is one to make, the call of `edgekv convert` that does.

    It is kept under a name made from the options and the contents of every file that they name.
    """
    import hashlib
    import json

    from edgekv import __version__
    from edgekv.cli.convert import command
    from edgekv.errors import InputError
    from edgekv.evaluate.model_under_test import file_sha256

    if entry.convert is None:
        assert entry.file is not None
        return None, folder / entry.file
    stored = [] if weights == "stored" else ["--weights", weights]
    fixed = [str(model), "-o", str(cache / "conversion.gguf"), "--json", *stored]
    try:
        context = command.make_context("convert", [*fixed, *shlex.split(entry.convert)])
    except (click.UsageError, ValueError) as error:  # ValueError: a quote that is not closed
        problem = error.format_message() if isinstance(error, click.UsageError) else error
        raise InputError(
            f"{entry.name}: convert = {entry.convert!r}: {problem}; `edgekv convert --help` lists the options"
        ) from error
    parameters = context.params
    for name in ("healed", "calib"):
        parameters[name] = _inside(folder, parameters[name])
    key = {name: _identity(value, file_sha256) for name, value in parameters.items() if name != "output"}
    digest = hashlib.sha256(json.dumps([__version__, key], sort_keys=True).encode()).hexdigest()
    parameters["output"] = cache / f"conversion-{digest[:16]}.gguf"
    return context, parameters["output"]


def _inside(folder: Path, value: Any) -> Any:
    """Paths as they are meant in a file that lies in `folder`."""
    if isinstance(value, tuple):
        return tuple(folder / path for path in value)
    return folder / value if value is not None else None


def _identity(value: Any, file_sha256: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(item, file_sha256) for item in value]
    return file_sha256(value) if isinstance(value, Path) else value


def _convert(context: click.Context) -> None:
    """Run a prepared `edgekv convert`; what it prints is not this command's."""
    import contextlib
    import io

    context.params["output"].parent.mkdir(parents=True, exist_ok=True)
    with context, contextlib.redirect_stdout(io.StringIO()):
        context.command.invoke(context)
