"""`edgekv bench`: measure models and cache types in turns."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import click

from edgekv.backends.open import KINDS, Kind, default_kind


@click.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(path_type=Path))
@click.option("-c", "--cache", "caches",
              help="Cache types, with commas: f16,q8_0; an ONNX folder has its own.  [default: f16]")  # fmt: skip
@click.option("-d", "--depth", "depths", default="0,512", show_default=True, help="Depths, with commas.")
@click.option("-p", "--n-prompt", default=128, show_default=True, help="Tokens of each timed prefill.")
@click.option("-n", "--n-gen", default=32, show_default=True, help="Tokens of each timed decode.")
@click.option("-r", "--repeats", default=5, show_default=True, help="Timed samples at each depth.")
@click.option("--context", default=0, help="Context to open.  [default: as the deepest point needs]")
@click.option("-t", "--threads", default=0, help="Engine threads.  [default: one a CPU in use]")
@click.option("--cpus", default="", help="CPUs to run on, as 0-3,6.  [default: the fast physical cores]")
@click.option("--backend", type=click.Choice(KINDS), help="Engine.  [default: what each model is made for]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the JSON report here.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON report instead of tables.")
def command(
    models: tuple[Path, ...],
    caches: str | None,
    depths: str,
    n_prompt: int,
    n_gen: int,
    repeats: int,
    context: int,
    threads: int,
    cpus: str,
    backend: Kind | None,
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
    edgekv bench model.gguf -c f16,q8_0,q4_0 -d 0,512,2048,7600
    edgekv bench small.gguf small-onnx -d 0,2048,7600
    edgekv compare run.json --html run.html
    """
    from edgekv.devices.bench import run as bench
    from edgekv.devices.reporting.compare import as_terminal
    from edgekv.devices.reporting.report import dumps
    from edgekv.devices.reporting.tables import Source
    from edgekv.files import atomic_path

    candidates = [
        bench.Candidate(model, cache, kind)
        for model in models
        for kind in [backend or default_kind(model)]
        for cache in cache_types(model, kind, caches)
    ]
    settings = bench.BenchSettings(
        depths=parse_depths(depths),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repeats=repeats,
        threads=threads,
        cpus=parse_cpus(cpus),
        context=context,
    )
    said = "edgekv " + " ".join(sys.argv[1:])
    # The output is opened first: nobody should wait for a bench whose report cannot be written.
    with atomic_path(output, force) if output else nullcontext() as partial:
        report = bench.run(candidates, settings, show_progress, said)
        text = dumps(report)
        if partial is not None:
            partial.write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text, nl=False)
        return
    click.echo(as_terminal((Source("this run", report),)))
    if output is not None:
        click.echo(f"report: {output}  (edgekv compare {output} --html page.html)")


def cache_types(model: Path, kind: Kind, wanted: str | None) -> list[str]:
    """Cache types to measure a model with: those asked for, where its engine has a choice."""
    from edgekv.models.onnx.manifest import read_manifest

    if kind == "onnx":
        return [read_manifest(model).model.cache_type]
    return [part.strip() for part in (wanted or ("f16" if kind == "llama.cpp" else "f32")).split(",")]


def show_progress(step: int, steps: int, text: str = "", /) -> None:
    """One line on stderr, rewritten in place on a terminal."""
    line = f"[{step}/{steps}] {text}"
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}" + ("\r\x1b[K" if step == steps else ""), nl=False, err=True)
    else:
        click.echo(line, err=True)


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
