"""`edgekv quantize`: smaller weights, with the error of every tensor."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json, print_table
from edgekv.cli.common.progress import stages
from edgekv.quant.formats import PRESET_NAMES

if TYPE_CHECKING:
    from edgekv.export.gguf.quantize import TensorReport
    from edgekv.workflows.quantize import QuantizeResult


@options.command("quantize")
@options.model()
@options.output("The GGUF to write.")
@click.option("--weights", required=True, type=click.Choice(PRESET_NAMES), metavar="PRESET",
              help=f"llama.cpp's preset: {', '.join(PRESET_NAMES)}.")  # fmt: skip
@options.text("Calibration text.  [default: the model writes it]", multiple=True)
@options.text_tokens(8192, "Tokens to calibrate on.")
@click.option("--no-importance", "importance", flag_value=False, default=True, type=bool,
              help="Weigh all errors alike; saves the calibration.")  # fmt: skip
@options.seed("Seed of the calibration sample.")
@options.threads()
@click.option("--each", is_flag=True, help="Show every tensor, not one row per kind.")
@options.force()
@options.as_json()
def command(each: bool, as_json: bool, **wanted: Any) -> None:
    """Quantize a model's weights with llama.cpp, weighing errors by an importance matrix.

    MODEL is a GGUF of any architecture that llama.cpp runs, or a Hugging Face folder. The presets' names say
    bits per weight: q8_0 loses next to nothing, q4_k_m is the usual choice, below q3 much is lost. What each
    tensor lost is shown. Importance runs the model over 8192 tokens: for billions of weights give it fewer, or
    --no-importance.

    \b
    edgekv quantize model.gguf -o model-q4.gguf --weights q4_k_m
    edgekv quantize Qwen2.5-0.5B-Instruct -o qwen-q4.gguf --weights q4_k_m --text book.txt
    edgekv quantize Llama-3.2-3B -o llama-q4.gguf --weights q4_k_m --no-importance
    """
    from edgekv.workflows.quantize import QuantizeRequest, quantize_model

    result = quantize_model(QuantizeRequest(**wanted), stages(quiet=as_json))
    if as_json:
        print_json(as_document(result))
    else:
        _show(result, each)


def as_document(result: QuantizeResult) -> dict[str, Any]:
    """The JSON object of a quantization."""
    before, after = result.nbytes
    return {
        "output": str(result.output),
        "weights": result.weights,
        "importance": result.importance,
        "source_was_quantized": result.source_was_quantized,
        "bytes": {"before": before, "after": after},
        "tensors": [asdict(report) for report in result.tensors],
    }


def _show(result: QuantizeResult, each: bool) -> None:
    groups: dict[tuple[str, str], list[TensorReport]] = {}
    for report in result.tensors:
        kind = report.name if each else ".".join(report.name.split(".")[2:-1]) or report.name
        groups.setdefault((kind, report.after), []).append(report)
    rows = []
    for (kind, after), members in groups.items():
        before = "/".join(sorted({member.before for member in members}))
        mark = " *" if any(member.fell_back for member in members) else ""
        size = sum(member.nbytes_after for member in members) / 2**20
        rows.append((kind, str(len(members)), before, after + mark, f"{size:.2f}", *_errors(members)))
    print_table(("tensors", "count", "from", "to", "MiB", "error", "weighted", "worst"), rows)
    click.echo("error: relative RMS of the weights; weighted: of their outputs on the calibration's inputs")
    shares = [report.error.compared for report in result.tensors if report.error is not None]
    if min(shares, default=1.0) < 1:
        click.echo(
            f"errors are of evenly spread rows, {min(shares):.0%} and more of each tensor above 786,432 values"
        )
    if fallen := [report for report in result.tensors if report.fell_back]:
        widths = sorted({report.shape[-1] for report in fallen})
        click.echo(
            f"* {len(fallen)} tensors have rows of {', '.join(map(str, widths))} values, which do not divide "
            f"into the blocks of 256 that {result.weights} wants: a format with blocks of 32 took its place"
        )
    if result.source_was_quantized:
        click.echo("the model was quantized already: start from f32, f16 or bf16 where you can")
    source, written = result.nbytes
    click.echo(f"wrote {result.output} ({written / 2**20:,.1f} MiB, {written / source:.1%} of the source)")


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
