"""`edgekv bench`: measure models and cache types in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line
from edgekv.cli.common.progress import ProgressLine


@options.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=options.PATH)
@click.option("--cache-type", "cache_types", default="", metavar="TYPES",
              help="Cache types, with commas: f16,q8_0; an ONNX folder has its own.  [default: f16]")  # fmt: skip
@click.option("-d", "--depth", "depths", default="0,512", show_default=True, help="Depths, with commas.")
@click.option("-p", "--n-prompt", default=128, show_default=True, help="Tokens of each timed prefill.")
@click.option("-n", "--n-gen", default=32, show_default=True, help="Tokens of each timed decode.")
@click.option("-r", "--repeats", default=5, show_default=True, help="Timed samples at each depth.")
@options.ctx_size("Context to open.  [default: as the deepest point needs]")
@options.threads()
@click.option("--cpus", default="", help="CPUs to run on, as 0-3,6.  [default: the fast physical cores]")
@options.backend("Engine.  [default: what each model is made for]")
@options.output("Write the JSON report here.", required=False)
@options.force()
@options.as_json("Print the JSON report instead of tables.")
def command(
    models: tuple[Path, ...],
    cache_types: str,
    depths: str,
    cpus: str,
    ctx_size: int | None,
    threads: int | None,
    backend: Any,
    n_prompt: int,
    n_gen: int,
    repeats: int,
    output: Path | None,
    force: bool,
    as_json: bool,
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
    from edgekv.workflows.bench import BenchRequest, BenchSettings, as_terminal, bench_models, dumps

    settings = BenchSettings(
        depths=parse_depths(depths),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repeats=repeats,
        threads=threads or 0,
        cpus=parse_cpus(cpus),
        context=ctx_size or 0,
    )
    kinds = tuple(part.strip() for part in cache_types.split(",")) if cache_types else ()
    request = BenchRequest(models, kinds, settings, backend, output, force, command_line())
    report = bench_models(request, ProgressLine("bench"))
    if as_json:
        click.echo(dumps(report), nl=False)
        return
    click.echo(as_terminal(report))
    if output is not None:
        click.echo(f"report: {output}  (edgekv compare {output} --html page.html)")


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths in rising order from "0,2048"."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list such as 0,2048", param_hint="--depth") from error


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers from "0-3,6"."""
    from edgekv.host.threads import parse_cpu_list

    try:
        return parse_cpu_list(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--cpus") from error
