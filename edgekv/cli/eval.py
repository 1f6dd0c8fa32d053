"""`edgekv eval`: what a model and its cache lose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekv.backends import KINDS, Kind
from edgekv.cli.eval_progress import progress_line

if TYPE_CHECKING:
    from edgekv.evaluate.subject import Subject, Weights
    from edgekv.evaluate.windows import WindowsResult

PATH = click.Path(path_type=Path)


@click.command("eval")
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, help="Text to measure perplexity on, in windows.")
@click.option("--against", type=PATH, help="Reference model: adds KL and argmax agreement over --text.")
@click.option("--window", default=1024, show_default=True, type=click.IntRange(4), help="Tokens a window.")
@click.option("--limit", type=click.IntRange(1), help="Score at most so many windows.")
@click.option("--cache-type", help="How the model's cache is stored.  [default: f16]")
@click.option("--backend", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="Engine.")
@click.option("--weights", type=click.Choice(("stored", "f16", "f32")), default="stored", show_default=True,
              help="Dequantize the weights first, so that the engine's 8-bit activations cost nothing.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(1), help="Engine threads.  [default: the big cores]")
@click.option("--cache-dir", type=PATH, help="Journals and references.  [default: ~/.cache/edgekv/eval]")
@click.option("--fresh", is_flag=True, help="Measure anew what an earlier run left.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: Path,
    text: Path | None,
    against: Path | None,
    window: int,
    limit: int | None,
    cache_type: str | None,
    backend: Kind,
    weights: Weights,
    threads: int | None,
    cache_dir: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Measure what MODEL and its cache lose.

    \b
    edgekv eval small.gguf --text wiki.test.raw --against model.gguf
    edgekv eval model.gguf --text wiki.test.raw --against model.gguf --cache-type q4_0 --limit 32

    The reference is run in float32 by the NumPy reference, from its own weights, and its distributions are kept in
    the cache folder: later runs on the same text start at once. Killed, a run goes on where it was when it is
    started again.
    """
    from edgekv.errors import InputError
    from edgekv.evaluate.journal import default_folder
    from edgekv.evaluate.report import Measured, make_report, windows_lines
    from edgekv.evaluate.subject import Subject

    if text is None:
        raise InputError("say what to measure on, for instance --text FILE")
    folder = cache_dir or default_folder()
    subject = Subject(model, backend, cache_type, weights, threads)
    reference = Subject(against, "reference") if against else None
    measured = Measured.of(subject)
    windows = _windows(subject, reference, text, window, limit, folder, fresh)
    if not as_json:
        click.echo("\n".join(windows_lines(windows)))
        return
    import json

    from edgekv.schema import encode

    said = "edgekv " + " ".join(sys.argv[1:])
    report = make_report(said, measured, Measured.of(reference) if reference else None, windows)
    click.echo(json.dumps(encode(report), indent=1, allow_nan=False))


def _windows(
    subject: Subject,
    reference: Subject | None,
    path: Path,
    length: int,
    limit: int | None,
    folder: Path,
    fresh: bool,
) -> WindowsResult:
    from edgekv.evaluate.reference import open_reference
    from edgekv.evaluate.subject import read_tokenizer, require_same_tokens
    from edgekv.evaluate.text import cut_windows
    from edgekv.evaluate.windows import measure_windows

    tokenizer = read_tokenizer(subject.path)
    text = cut_windows(path, tokenizer, length, limit)
    if reference is None:
        with progress_line("windows") as advance:
            return measure_windows(subject, text, None, folder, advance, fresh)
    require_same_tokens(subject.path, reference.path)
    with open_reference(reference, text, len(tokenizer), folder, fresh) as held:
        with progress_line("reference") as advance:
            held.fill(advance)
        with progress_line("windows") as advance:
            return measure_windows(subject, text, held, folder, advance, fresh)
