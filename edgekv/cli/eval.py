"""`edgekv eval`: the loss of a model and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line
from edgekv.cli.common.progress import begin

MEASURES = ("windows", "positions", "needles", "ruler")
WEIGHTS = ("keep", "bf16", "f16", "f32")


def parse_measures(text: str) -> tuple[str, ...]:
    """What to measure of the text, from "windows,positions"."""
    wanted = options.parse_words(text)
    if unknown := set(wanted).difference(MEASURES):
        raise ValueError(f"{min(unknown)!r} is not one of {', '.join(MEASURES)}")
    return wanted


def parse_lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens from "1024,4096"."""
    lengths = options.parse_words(text)
    if wrong := [length for length in lengths if not length.isdecimal() or int(length) < 1]:
        raise ValueError(f"{wrong[0]!r} is not a number of tokens")
    return tuple(map(int, lengths))


def parse_tasks(values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Names and files from NAME=FILE."""
    pairs = [(value, *value.partition("=")[::2]) for value in values]
    for value, name, file in pairs:
        if not (name and file):
            raise ValueError(f"{value!r} is not NAME=FILE")
    return tuple((name, Path(file)) for _, name, file in pairs)


@options.command("eval")
@options.model(loads=True)
@options.text("Text to measure on.")
@click.option(
    "--against", type=options.LOADED_MODEL, help="Reference model: adds KL, argmax agreement and changes."
)
@click.option("--task", "tasks", multiple=True, metavar="NAME=FILE",
              callback=options.parsed(parse_tasks),
              help="lambada, arc_easy, piqa, winogrande or hellaswag, with a file of questions.")  # fmt: skip
@click.option("--measure", default="windows", show_default=True, metavar="WHAT",
              callback=options.parsed(parse_measures),
              help="Of --text, with commas: windows (perplexity), positions (perplexity by position, up to the full "
              "context), needles (planted lines are asked for), ruler (RULER's 13 kinds of tasks).")  # fmt: skip
@click.option("--window", default=1024, show_default=True, type=click.IntRange(4), help="Tokens per window.")
@click.option("--scored", type=click.IntRange(1), metavar="N",
              help="Predictions to score at the end of each window.  [default: its second half]")  # fmt: skip
@options.ctx_size("The full context.  [default: the trained one]", least=4)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="At most N windows, and N questions per task."
)
@click.option(
    "--sequences",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences of the full context, for positions.",
)
@click.option("--trials", default=4, show_default=True, type=click.IntRange(1),
              help="Trials per length and depth, for needles; per length and kind, for ruler.")  # fmt: skip
@click.option("--lengths", default="", metavar="N,N", callback=options.parsed(parse_lengths),
              help="Tokens of the prompts, for ruler.  [default: the full context]")  # fmt: skip
@click.option("--kinds", default="", metavar="KIND,KIND", callback=options.parsed(options.parse_words),
              help="Kinds of tasks, for ruler.  [default: all]")  # fmt: skip
@options.seed("What ruler's tasks are drawn from.")
@click.option("--see-question", is_flag=True,
              help="Let ruler's questions come before the cache is cut to its budget, not behind it.")  # fmt: skip
@options.budget()
@click.option("--slice", "slice_size", default=512, show_default=True, type=click.IntRange(1),
              help="Tokens of a prompt between two evictions: so many more than --budget are held.")  # fmt: skip
@options.cache_type("How the model's cache is stored.  [default: f16]")
@options.backend()
@options.backend(
    "Engine of --against; llama.cpp runs it with an f32 cache and the same --weights.  "
    "[default: reference, for ONNX folders onnx]",
    "--against-backend",
)
@click.option("--weights", type=click.Choice(WEIGHTS), default=WEIGHTS[0], show_default=True,
              help="Dequantize the weights first, so that only the cache's loss is left.")  # fmt: skip
@options.kernel()
@options.effort
@options.as_json("Print one JSON document.")
def command(
    text: Path | None, measure: tuple[str, ...], ctx_size: int | None, as_json: bool, **wanted: Any
) -> None:
    """Measure what MODEL and its cache lose.

    \b
    edgekv eval small.gguf --against model.gguf --text wiki.test.raw
    edgekv eval model.gguf --against model.gguf --text wiki.test.raw --cache-type q4_0 --limit 32
    edgekv eval small.gguf --task piqa=piqa.jsonl --task lambada=lambada.jsonl
    edgekv eval small.gguf --text book.txt --measure positions,needles -c 8192
    edgekv eval small.gguf --measure ruler --lengths 1024,4096 --trials 10

    The reference runs in float32, and its distributions are kept: later runs on the same text start at once.
    A run that was killed goes on where it was, when the same command is started again.
    """
    from edgekv.text.windows import OTHER_KINDS
    from edgekv.workflows.evaluate import Effort, EvaluateRequest, Measurements, evaluate_model

    wanted |= {
        "text": text if "windows" in measure else None,
        "positions": text if "positions" in measure else None,
        "retrieval": text if "needles" in measure else None,
        "ruler": (text or OTHER_KINDS) if "ruler" in measure else None,
        "context": ctx_size,
        "command": command_line(),
    }
    measurements, effort = options.build(Measurements, wanted), options.build(Effort, wanted)
    request = EvaluateRequest(measurements=measurements, effort=effort, **wanted)
    report = evaluate_model(request, begin, lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(report.to_json(), nl=False)
