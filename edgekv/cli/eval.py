"""`edgekv eval`: what a model and its cache lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line
from edgekv.cli.common.progress import begin

MEASURES = ("windows", "positions", "needles")
WEIGHTS = ("keep", "bf16", "f16", "f32")


@options.command("eval")
@options.model()
@options.text("Text to measure on.")
@click.option("--against", type=options.PATH, help="Reference model: adds KL, argmax agreement and changes.")
@click.option("--task", "tasks", multiple=True, metavar="NAME=FILE",
              help="lambada, arc_easy, piqa, winogrande or hellaswag, with a file of questions.")  # fmt: skip
@click.option("--measure", default="windows", show_default=True, metavar="WHAT",
              help="Of --text, with commas: windows (perplexity), positions (perplexity by position, up to the full "
              "context), needles (planted lines are asked for).")  # fmt: skip
@click.option("--window", default=1024, show_default=True, type=click.IntRange(4), help="Tokens per window.")
@options.ctx_size("The full context.  [default: the trained one]", least=4)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="At most N windows, and N questions per task."
)
@click.option("--sequences", default=8, show_default=True, type=click.IntRange(1), help="For positions.")
@click.option("--trials", default=4, show_default=True, type=click.IntRange(1),
              help="For needles, at each length and depth.")  # fmt: skip
@options.cache_type("How the model's cache is stored.  [default: f16]")
@options.backend()
@options.backend(
    "Engine of --against; llama.cpp runs it with an f32 cache and the same --weights.  "
    "[default: reference, for ONNX folders onnx]",
    "--against-backend",
)
@click.option("--weights", type=click.Choice(WEIGHTS), default=WEIGHTS[0], show_default=True,
              help="Dequantize the weights first, so that only the cache's loss is left.")  # fmt: skip
@options.effort
@options.as_json("Print one JSON document.")
def command(
    model: Path,
    against: Path | None,
    tasks: tuple[str, ...],
    text: Path | None,
    measure: str,
    cache_type: str | None,
    backend: Any,
    against_backend: Any,
    weights: Any,
    ctx_size: int | None,
    window: int,
    limit: int | None,
    sequences: int,
    trials: int,
    as_json: bool,
    **effort_options: Any,
) -> None:
    """Measure what MODEL and its cache lose.

    \b
    edgekv eval small.gguf --against model.gguf --text wiki.test.raw
    edgekv eval model.gguf --against model.gguf --text wiki.test.raw --cache-type q4_0 --limit 32
    edgekv eval small.gguf --task piqa=piqa.jsonl --task lambada=lambada.jsonl
    edgekv eval small.gguf --text book.txt --measure positions,needles -c 8192

    The reference runs in float32, and its distributions are kept: later runs on the same text start at once.
    Killed, a run goes on where it was when it is started again.
    """
    from edgekv.workflows.evaluate import Effort, EvaluateRequest, Measurements, evaluate_model

    measures = parse_measures(measure)
    measurements = Measurements(
        text=text if "windows" in measures else None,
        window=window,
        tasks=parse_tasks(tasks),
        positions=text if "positions" in measures else None,
        retrieval=text if "needles" in measures else None,
        context=ctx_size,
        limit=limit,
        sequences=sequences,
        trials=trials,
    )
    request = EvaluateRequest(
        model,
        measurements,
        against,
        cache_type,
        backend,
        against_backend,
        weights,
        Effort(**effort_options),
        command_line(),
    )
    report = evaluate_model(request, begin, lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(report.to_json(), nl=False)


def parse_measures(value: str) -> set[str]:
    """What to measure of the text, from "windows,positions"."""
    wanted = {part.strip() for part in value.split(",")}
    if unknown := sorted(wanted - set(MEASURES)):
        raise click.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(MEASURES)}", param_hint="--measure"
        )
    return wanted


def parse_tasks(values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Names and files from NAME=FILE."""
    pairs = [value.partition("=") for value in values]
    for name, equals, file in pairs:
        if not (name and equals and file):
            raise click.BadParameter(f"{name + equals + file!r} is not NAME=FILE", param_hint="--task")
    return tuple((name, Path(file)) for name, _, file in pairs)
