"""`edgekv sweep`: a comparison of conversions and cache types, as JSON, table and picture."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line
from edgekv.cli.common.progress import begin
from edgekv.errors import InputError
from edgekv.models.hub.names import is_hub_name

if TYPE_CHECKING:
    from edgekv.evaluate.sweep import Conversion, SweepSpec
    from edgekv.workflows.convert import ConvertRequest


@options.command("sweep")
@click.argument("file", type=options.PATH)
@options.output("Write OUTPUT.json, .md and .svg.  [default: FILE's name]", required=False)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N windows.")
@options.force("Replace them.")
@options.kernel()
@options.effort
@options.as_json("Print one JSON document.")
def command(
    file: Path, output: Path | None, limit: int | None, force: bool, as_json: bool, **effort_options: Any
) -> None:
    """Compare the conversions and cache types that a TOML FILE names, by loss and bytes per token.

    docs/eval.md shows such a file. Nothing that was measured or converted before is done again.

    \b
    edgekv sweep sweep.toml
    edgekv sweep sweep.toml --limit 12 -o quick
    """
    from edgekv.workflows.sweep import Effort, SweepRequest, read_sweep, sweep_models

    spec = _fetched(read_sweep(file), as_json)
    request = SweepRequest(
        spec=spec,
        folder=file.parent,
        output=output or file.with_suffix(""),
        conversions=conversions(spec, file.parent),
        limit=limit,
        force=force,
        effort=Effort(**effort_options),
        command=command_line(),
    )
    report = sweep_models(request, begin, lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(report.to_json(), nl=False)


def _fetched(spec: SweepSpec, quiet: bool) -> SweepSpec:
    """The sweep with the path of a model that it names on the Hub."""
    if not is_hub_name(spec.model):
        return spec
    import msgspec

    return msgspec.structs.replace(spec, model=str(options.local_model(Path(spec.model), quiet).absolute()))


def conversions(spec: SweepSpec, folder: Path) -> dict[str, ConvertRequest]:
    """A request for each conversion that is given as options of `edgekv convert`; all are read before one is made.

    Raises:
        InputError: they are not options of `edgekv convert`.
    """
    return {
        entry.name: _request(entry, spec, folder) for entry in spec.conversion if entry.convert is not None
    }


def _request(entry: Conversion, spec: SweepSpec, folder: Path) -> ConvertRequest:
    from edgekv.cli.convert import command as convert
    from edgekv.workflows.convert import ConvertRequest

    assert entry.convert is not None
    stored = [] if spec.weights == "keep" else ["--weights", spec.weights]
    fixed = [str(folder / spec.model), "-o", "conversion.gguf", *stored]
    try:
        context = convert.make_context("convert", [*fixed, *shlex.split(entry.convert)])
    except (click.UsageError, ValueError) as error:  # ValueError: a quote that is not closed
        problem = error.format_message() if isinstance(error, click.UsageError) else error
        raise InputError(
            f"{entry.name}: convert = {entry.convert!r}: {problem}; `edgekv convert --help` lists the options"
        ) from error
    wanted = dict(context.params)
    del wanted["as_json"]
    wanted["text"] = tuple(folder / path for path in wanted["text"])
    wanted["healed"] = folder / wanted["healed"] if wanted["healed"] else None
    return ConvertRequest(**wanted)
