"""`edgekv convert`: a model with a latent cache from a GQA model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json, print_table
from edgekv.cli.common.progress import stages
from edgekv.quant.formats import KEEP, PLAIN_WEIGHTS

if TYPE_CHECKING:
    from edgekv.convert.layers import LayerLoss
    from edgekv.workflows.convert import ConvertResult


@options.command("convert")
@options.model()
@options.output("What to write: NAME.gguf for llama.cpp, NAME.edgekv for later export, else an ONNX folder.")
@options.latent_size(rope_default="the head dim")
@click.option("--value-dim", type=int, help="Value dims per head (v_head_dim).  [default: the head dim]")
@click.option("--method", default="edgekv", show_default=True, type=click.Choice(["edgekv", "transmla"]),
              help="Training-free method; transmla is the published one, for comparison.")  # fmt: skip
@click.option("--fold-biases", is_flag=True,
              help="Convert a model with biases (Qwen2): write them into the weights, nearly.")  # fmt: skip
@click.option("--healed", type=options.PATH, help="File of `edgekv heal` to build from, instead of fitting.")
@click.option("--weights", default=KEEP, show_default=True,
              type=click.Choice((KEEP, *PLAIN_WEIGHTS, "int8", "int4")),
              help="Weight format; keep leaves untouched tensors as stored and writes new ones in q8_0. An ONNX "
                   "folder's are int4 (keep), int8 or f32.")  # fmt: skip
@click.option("--cache-type", default="f32", show_default=True, type=click.Choice(("f32", "int8")),
              help="Number format of an ONNX folder's cache.")  # fmt: skip
@options.text("Calibration text.  [default: the model writes it]", multiple=True)
@options.text_tokens(None, "Tokens to calibrate on.  [default: 32768, or 16384 that the model writes]")
@options.seed("Seed of the calibration sample.")
@click.option("--verify", is_flag=True, help="Reload in llama.cpp and compare with the NumPy reference.")
@options.force()
@options.as_json()
def command(output: Path, as_json: bool, **wanted: Any) -> None:
    """Convert a GQA or MHA model into one whose cache is a compressed latent.

    A .gguf is one that unmodified llama.cpp runs, which has a graph for plain models only. An ONNX folder takes every
    family: biases, normed queries and keys, scaled RoPE, windows.

    \b
    edgekv convert model.gguf -o half.gguf --target 0.5
    edgekv convert model.gguf -o third.gguf --kv-lora-rank 64 --rope-dim 64 --text book.txt
    edgekv convert model.gguf -o third.gguf --healed third.safetensors --verify
    edgekv convert qwen2.5.gguf -o qwen2.5-half --target 0.5 --cache-type int8
    """
    from edgekv.workflows.convert import ConvertRequest, convert_model

    result = convert_model(ConvertRequest(output=output, **wanted), stages(quiet=as_json))
    if as_json:
        print_json(as_document(result))
    else:
        _show(result)


def as_document(result: ConvertResult) -> dict[str, Any]:
    """The JSON object of a conversion."""
    before, after = result.cache_nbytes
    return {
        "output": str(result.output),
        "bytes": result.nbytes,
        "cache_bytes_per_token": {"before": before, "after": after},
        "notes": dict(result.notes),
        "layers": [asdict(loss) for loss in result.layers],
        "warnings": list(result.warnings),
        "verify": asdict(result.comparison) if result.comparison else None,
    }


def _show(result: ConvertResult) -> None:
    if result.layers:
        _loss_table(result.layers)
    before, after = result.cache_nbytes
    click.echo(f"cache: {before:,} -> {after:,} bytes per token in f16 ({after / before - 1:+.1%})")
    if (found := result.comparison) is not None:
        click.echo(
            f"llama.cpp against the reference on {found.tokens} tokens: KL {found.kl:.2e}, "
            f"max logit error {found.max_logit_error:.2e}, argmax {found.argmax_agreement:.1%}"
        )
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"wrote {result.output} ({result.nbytes / 2**20:,.1f} MiB)")


def _loss_table(losses: Sequence[LayerLoss]) -> None:
    biased = any(loss.bias_error for loss in losses)
    others = [f"{loss.elsewhere_error:.3f}" for loss in losses if loss.elsewhere_error is not None]
    split = any(loss.rope_dim for loss in losses)
    rows = (
        (str(x.layer), f"{x.rope_kept:.1%}", f"{x.latent_kept:.1%}", f"{x.output_error:.3f}")
        + tuple(others[i : i + 1])
        + (f"{x.bias_error:.1%}",) * biased
        + (str(x.rope_dim),) * split
        for i, x in enumerate(losses)
    )
    optional = ["on other text"] * bool(others) + ["bias error"] * biased + ["rope dims"] * split
    print_table(("layer", "rope key keeps", "latent keeps", "output error", *optional), rows)
    curve = {
        rank: sum(x.latent_kept_at[rank] for x in losses) / len(losses) for rank in losses[0].latent_kept_at
    }
    if curve:
        shares = ", ".join(f"{rank} {share:.1%}" for rank, share in curve.items())
        click.echo(f"a latent of rank r keeps, over all layers: {shares}")
