"""`edgekv quantize`: smaller weights, with the error of every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common.bar import progress

if TYPE_CHECKING:
    from edgekv.export.gguf.quantize import TensorReport

PATH = click.Path(path_type=Path)
WEIGHTS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl"),
    *("iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "iq3_xxs", "q2_k", "iq2_m", "iq2_xs"),
)
WHOLE = ("F32", "F16", "BF16")


@click.command("quantize")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The GGUF to write.")
@click.option("--weights", required=True, type=click.Choice(WEIGHTS), metavar="PRESET",
              help=f"llama.cpp's preset: {', '.join(WEIGHTS)}.")  # fmt: skip
@click.option("--calib", multiple=True, type=PATH, help="Calibration text.  [default: the model writes it]")
@click.option("--calib-tokens", default=8192, show_default=True, help="Tokens to calibrate on.")
@click.option("--no-importance", is_flag=True, help="Weigh all errors alike; saves the calibration.")
@click.option("--seed", default=0, show_default=True, help="Of the calibration sample.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: the big cores]")
@click.option("--each", is_flag=True, help="Show every tensor, not one row for each kind.")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: Path,
    output: Path,
    weights: str,
    calib: tuple[Path, ...],
    calib_tokens: int,
    no_importance: bool,
    seed: int,
    threads: int | None,
    each: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize a model's weights with llama.cpp, weighing errors by what the model's inputs are like.

    MODEL is a GGUF of any architecture that llama.cpp runs, or a Hugging Face folder. The presets' names say
    bits a weight: q8_0 loses next to nothing, q4_k_m is the usual choice, below q3 much is lost. What each
    tensor lost is shown. Importance runs the model over 8192 tokens: for billions of weights give it fewer, or
    --no-importance.

    \b
    edgekv quantize model.gguf -o model-q4.gguf --weights q4_k_m
    edgekv quantize Qwen2.5-0.5B-Instruct -o qwen-q4.gguf --weights q4_k_m --calib book.txt
    edgekv quantize Llama-3.2-3B -o llama-q4.gguf --weights q4_k_m --no-importance
    """
    import contextlib

    from edgekv.backends.isolated.quantizer import Quantizer
    from edgekv.errors import InputError
    from edgekv.export.gguf.quantize import calibration_windows, quantizable_header, quantize_gguf
    from edgekv.export.gguf.stream import staged_gguf
    from edgekv.files import check_output
    from edgekv.models.open import open_with_tokenizer
    from edgekv.quant.presets import PRESETS

    check_output(output, force)
    if output.exists() and model.exists() and output.samefile(model):
        raise InputError(f"{output} is the model itself; choose another name")
    wanted = not no_importance and PRESETS[weights].importance != "ignored"
    importance = {}
    with contextlib.ExitStack() as stack:
        staged = None
        if model.is_dir():
            staged = stack.enter_context(staged_gguf(open_with_tokenizer(model), output, wanted))
        path = staged.path if staged else model
        header, quantizer = quantizable_header(path), Quantizer(path, threads)
        if staged and wanted:
            with progress("reading", as_json) as advance:
                staged.wait_all(advance)
        if wanted:
            with progress("sampling calibration text" if not calib else "reading text", as_json) as advance:
                windows = calibration_windows(path, list(calib), calib_tokens, seed, quantizer, advance)
            with progress("measuring importance", as_json) as advance:
                importance = quantizer.measure(windows, advance)
        with progress("quantizing", as_json) as advance:
            reports = quantize_gguf(path, output, weights, importance, quantizer, force, advance, staged)
        nbytes = (path.stat().st_size, output.stat().st_size)
    requantized = any(tensor.ggml_type not in WHOLE for tensor in header.tensors)
    if as_json:
        _print_json(output, weights, bool(importance), requantized, nbytes, reports)
    else:
        _show(output, weights, requantized, nbytes, reports, each)


def _print_json(
    output: Path,
    weights: str,
    importance: bool,
    requantized: bool,
    nbytes: tuple[int, int],
    reports: list[TensorReport],
) -> None:
    from dataclasses import asdict

    document = {
        "output": str(output),
        "weights": weights,
        "importance": importance,
        "source_was_quantized": requantized,
        "bytes": {"before": nbytes[0], "after": nbytes[1]},
        "tensors": [asdict(report) for report in reports],
    }
    click.echo(json.dumps(document, indent=1))


def _show(
    output: Path,
    weights: str,
    requantized: bool,
    nbytes: tuple[int, int],
    reports: list[TensorReport],
    each: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    groups: dict[tuple[str, str], list[TensorReport]] = {}
    for report in reports:
        kind = report.name if each else ".".join(report.name.split(".")[2:-1]) or report.name
        groups.setdefault((kind, report.after), []).append(report)
    table = Table("tensors", "count", "from", "to", "MiB", "error", "weighted", "worst")
    for (kind, after), members in groups.items():
        before = "/".join(sorted({member.before for member in members}))
        mark = " *" if any(member.fell_back for member in members) else ""
        size = sum(member.nbytes_after for member in members) / 2**20
        table.add_row(kind, str(len(members)), before, after + mark, f"{size:.2f}", *_errors(members))
    Console().print(table)
    click.echo("error: relative RMS of the weights; weighted: of what they give on the calibration's inputs")
    shares = [report.error.compared for report in reports if report.error is not None]
    if min(shares, default=1.0) < 1:
        click.echo(
            f"errors are of evenly spread rows, {min(shares):.0%} and more of each tensor above 786,432 values"
        )
    if fallen := [report for report in reports if report.fell_back]:
        widths = sorted({report.shape[-1] for report in fallen})
        click.echo(
            f"* {len(fallen)} tensors have rows of {', '.join(map(str, widths))} values, which do not divide "
            f"into the blocks of 256 that {weights} wants: a format with blocks of 32 took its place"
        )
    if requantized:
        click.echo("the model was quantized already: start from f32, f16 or bf16 where you can")
    click.echo(f"wrote {output} ({nbytes[1] / 2**20:,.1f} MiB, {nbytes[1] / nbytes[0]:.1%} of the source)")


def _errors(members: list[TensorReport]) -> tuple[str, str, str]:
    """Root mean squares over tensors, and which is worst."""
    errors = [(member, member.error) for member in members if member.error is not None]
    if not errors:
        return "unknown", "", ""

    def mean(values: list[float]) -> float:
        return float((sum(value**2 for value in values) / len(values)) ** 0.5)

    weighted = [error.weighted for _, error in errors if error.weighted is not None]
    worst = max(errors, key=lambda pair: _size(pair[1]))
    label = f"{_size(worst[1]):.2%} {'.'.join(worst[0].name.split('.')[:2])}" if len(errors) > 1 else ""
    return (
        f"{mean([error.rms for _, error in errors]):.2%}",
        f"{mean(weighted):.2%}" if weighted else "",
        label,
    )


def _size(error: Any) -> float:
    return float(error.rms if error.weighted is None else error.weighted)
