"""`edgekv eval`: what a model and its cache lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.backends.open import KINDS, Kind, default_kind
from edgekv.cli.common.output import command_line

if TYPE_CHECKING:
    from edgekv.evaluate.model_under_test import ModelUnderTest, Weights

PATH = click.Path(path_type=Path)
WEIGHTS = ("stored", "bf16", "f16", "f32")


@click.command("eval")
@click.argument("model", type=PATH, required=False)
@click.option("--text", type=PATH, help="Text for perplexity, in windows.")
@click.option("--against", type=PATH, help="Reference model: adds KL, argmax agreement and changes.")
@click.option("--task", "tasks", multiple=True, metavar="NAME=FILE",
              help="lambada, arc_easy, piqa, winogrande or hellaswag, with a file of questions.")  # fmt: skip
@click.option("--positions", type=PATH, help="Long text for perplexity by position, up to the full context.")
@click.option("--retrieval", type=PATH, help="Long text to plant lines in and ask for them.")
@click.option(
    "--sweep", type=PATH, help="TOML file of conversions and cache types to compare, instead of MODEL."
)
@click.option(
    "-o", "--output", type=PATH, help="For --sweep: write OUTPUT.json, .md and .svg.  [default: its name]"
)
@click.option("--force", is_flag=True, help="Replace them.")
@click.option("--window", default=1024, show_default=True, type=click.IntRange(4), help="Tokens a window.")
@click.option("--context", type=click.IntRange(4), help="The full context.  [default: the trained one]")
@click.option("--limit", type=click.IntRange(1), help="At most so many windows, and questions a task.")
@click.option("--sequences", default=8, show_default=True, type=click.IntRange(1), help="For --positions.")
@click.option("--trials", default=4, show_default=True, type=click.IntRange(1),
              help="For --retrieval, at each length and depth.")  # fmt: skip
@click.option("--cache-type", help="How the model's cache is stored.  [default: f16]")
@click.option("--backend", type=click.Choice(KINDS), help="Engine.  [default: what MODEL is made for]")
@click.option("--against-backend", type=click.Choice(KINDS),
              help="Engine of --against; llama.cpp runs it with an f32 cache and the same --weights.  "
              "[default: reference, for ONNX folders onnx]")  # fmt: skip
@click.option("--weights", type=click.Choice(WEIGHTS), default=WEIGHTS[0], show_default=True,
              help="Dequantize the weights first, so that only the cache's loss is left.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(1), help="Cores to use.  [default: the big ones]")
@click.option("-j", "--jobs", type=click.IntRange(1),
              help="Processes that share them.  [default: one a core, as memory allows]")  # fmt: skip
@click.option("--cache-dir", type=PATH, help="Journals and references.  [default: ~/.cache/edgekv/eval]")
@click.option("--fresh", is_flag=True, help="Measure anew what earlier runs left.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: Path | None,
    against: Path | None,
    tasks: tuple[str, ...],
    cache_type: str | None,
    backend: Kind | None,
    against_backend: Kind | None,
    weights: Weights,
    threads: int | None,
    jobs: int | None,
    cache_dir: Path | None,
    fresh: bool,
    as_json: bool,
    sweep: Path | None,
    output: Path | None,
    force: bool,
    **wanted: Any,
) -> None:
    """Measure what MODEL and its cache lose.

    \b
    edgekv eval small.gguf --against model.gguf --text wiki.test.raw
    edgekv eval model.gguf --against model.gguf --text wiki.test.raw --cache-type q4_0 --limit 32
    edgekv eval small.gguf --task piqa=piqa.jsonl --task lambada=lambada.jsonl
    edgekv eval small.gguf --positions book.txt --retrieval book.txt --context 8192
    edgekv eval --sweep sweep.toml

    The reference runs in float32, and its distributions are kept: later runs on the same text start at once.
    Killed, a run goes on where it was when it is started again.
    """
    import json

    from edgekv.cli.common.progress import ProgressLine
    from edgekv.documents import encode
    from edgekv.evaluate.journal import default_folder
    from edgekv.evaluate.model_under_test import ModelUnderTest
    from edgekv.evaluate.run import Evaluation, Request
    from edgekv.evaluate.workers import Run

    require_one_mode(ctx, sweep is not None)
    run = Run(cache_dir or default_folder(), lambda *_: None, jobs, threads, fresh)
    if sweep is not None:
        from edgekv.cli.sweep import run_sweep

        run_sweep(sweep, output, wanted["limit"], force, as_json, run)
        return
    assert model is not None
    request = Request(tasks=parse_tasks(tasks), **wanted)
    subject = ModelUnderTest(model, backend or default_kind(model), cache_type, weights)
    reference = reference_subject(against, against_backend, weights) if against else None
    evaluation = Evaluation(subject, reference, run, ProgressLine, lambda line: click.echo(line, err=as_json))
    report = evaluation.run(request, command_line())
    if as_json:
        click.echo(json.dumps(encode(report), indent=1, allow_nan=False))


# What a sweep takes from the command line; the rest is in its file.
SWEEP_OPTIONS = {"sweep", "output", "force", "limit", "threads", "jobs", "cache_dir", "fresh", "as_json"}


def require_one_mode(context: click.Context, sweep: bool) -> None:
    """Refuse options of --sweep without it, and others with it; raises click.UsageError."""
    given = {
        parameter.name: parameter
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
    }
    if not sweep and "model" not in given:
        raise click.UsageError("name a model, or a file of points with --sweep", context)
    wrong = set(given) - SWEEP_OPTIONS if sweep else set(given) & {"output", "force"}
    for name in sorted(str(name) for name in wrong):
        hint = given[name].get_error_hint(context)
        reason = "comes from the file of --sweep" if sweep else "belongs to --sweep"
        raise click.UsageError(f"{hint} {reason}; leave it out", context)


def reference_subject(path: Path, backend: Kind | None, weights: Weights) -> ModelUnderTest:
    """The reference as it is run: in float32 by NumPy, or in llama.cpp with nothing rounded but by its kernels."""
    from edgekv.evaluate.model_under_test import ModelUnderTest

    if backend is None:
        backend = "onnx" if default_kind(path) == "onnx" else "reference"
    return (
        ModelUnderTest(path, backend, "f32", weights)
        if backend == "llama.cpp"
        else ModelUnderTest(path, backend)
    )


def parse_tasks(values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Names and files from NAME=FILE."""
    pairs = [value.partition("=") for value in values]
    for name, equals, file in pairs:
        if not (name and equals and file):
            raise click.BadParameter(f"{name + equals + file!r} is not NAME=FILE", param_hint="--task")
    return tuple((name, Path(file)) for name, _, file in pairs)
