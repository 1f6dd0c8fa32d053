"""`edgekv bench`: speed and memory of models and cache types, measured in turns."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line
from edgekv.cli.common.progress import ProgressLine
from edgekv.host.threads import parse_cpu_list


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths in rising order from "0,2048"."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list such as 0,2048") from error


@options.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=options.LOADED_MODEL)
@click.option("--cache-type", "cache_types", default="", metavar="TYPES",
              callback=options.parsed(options.parse_words),
              help="Cache types, with commas: f16,q8_0/q4_0; an ONNX folder has its own.  [default: f16]")  # fmt: skip
@click.option("-d", "--depth", "depths", default="0,512", show_default=True, metavar="DEPTHS",
              callback=options.parsed(parse_depths), help="Depths, with commas.")  # fmt: skip
@click.option("-p", "--n-prompt", default=128, show_default=True, help="Tokens of each timed prefill.")
@click.option("-n", "--n-gen", default=32, show_default=True, help="Tokens of each timed decode.")
@click.option("-r", "--repeats", default=5, show_default=True, help="Timed samples at each depth.")
@options.ctx_size("Context to open.  [default: what the deepest point needs]")
@options.budget()
@options.threads()
@click.option("--cpus", default="", metavar="CPUS", callback=options.parsed(parse_cpu_list),
              help="CPUs to run on, as 0-3,6.  [default: the fast physical cores]")  # fmt: skip
@options.backend("Engine.  [default: the one for each model's format]")
@options.kernel()
@options.output("Write the JSON report here.", required=False)
@options.force()
@options.as_json("Print the JSON report instead of tables.")
def command(
    models: tuple[Path, ...], ctx_size: int | None, threads: int | None, as_json: bool, **wanted: Any
) -> None:
    """Measure prefill and decode speed and memory; every model with every cache type takes turns.

    Each candidate runs in a process of its own, pinned to the same cores, so that its memory is its own
    and noise hits all alike. Medians of the samples are printed with half their spread.

    \b
    edgekv bench model.gguf
    edgekv bench model.gguf small.gguf -d 0,2048 -o run.json
    edgekv bench model.gguf --cache-type f16,q8_0,q4_0 -d 0,512,2048,7600
    edgekv bench small.gguf small-onnx -d 0,2048,7600
    edgekv compare run.json --html run.html
    """
    from edgekv.workflows.bench import BenchRequest, BenchSettings, as_terminal, bench_models, dumps, load_now

    wanted |= {"context": ctx_size or 0, "threads": threads or 0}
    settings = options.build(BenchSettings, wanted)
    request = BenchRequest(models, settings=settings, command=command_line(), **wanted)
    if (load := load_now()) and load.busy:
        click.echo(f"warning: {load.words()}, and speeds will be theirs too; end them for figures that compare",
                   err=True)  # fmt: skip
    report = bench_models(request, ProgressLine("bench"))
    if as_json:
        click.echo(dumps(report), nl=False)
        return
    click.echo(as_terminal(report))
    if (output := request.output) is not None:
        page = shlex.join(["edgekv", "compare", str(output), "--html", "page.html"])
        click.echo(f"report: {output}  ({page})")
