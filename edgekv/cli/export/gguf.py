"""`edgekv export gguf`: a Hugging Face folder, or another GGUF, as one file that llama.cpp runs."""

from __future__ import annotations

from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json
from edgekv.cli.common.progress import stages
from edgekv.quant.formats import KEEP, MIXES, PLAIN_WEIGHTS

WEIGHTS = (KEEP, *PLAIN_WEIGHTS, *MIXES)


@options.command("gguf")
@options.model()
@options.output("The GGUF to write.")
@click.option("--weights", default=KEEP, show_default=True, type=click.Choice(WEIGHTS),
              metavar="FORMAT", help=f"Weight format: {', '.join(WEIGHTS)}.")  # fmt: skip
@options.force()
@options.as_json()
def command(as_json: bool, **wanted: Any) -> None:
    """Write a model as the GGUF that unmodified llama.cpp runs, tokenizer and chat template included.

    Models with a native latent cache keep it (as deepseek2); others keep their architecture. keep copies the
    weights bit by bit. From q6_k on llama.cpp mixes formats (it has to be installed); edgekv quantize writes the
    same mixes, weighs errors by an importance matrix, and shows them.

    \b
    edgekv export gguf SmolLM2-135M-Instruct -o smollm2.gguf
    edgekv export gguf Qwen2.5-0.5B-Instruct -o qwen.gguf --weights q8_0
    edgekv export gguf Llama-3.2-1B-Instruct -o llama.gguf --weights q4_k_m
    """
    from edgekv.workflows.export import ExportGGUFRequest, export_gguf

    result = export_gguf(ExportGGUFRequest(**wanted), stages(quiet=as_json))
    trained, context = result.context_lengths
    if as_json:
        found = {"output": str(result.output), "architecture": result.architecture, "weights": result.weights}
        print_json(found | {"bytes": result.nbytes, "context_length": context})
        return
    click.echo(
        f"wrote {result.output} ({result.nbytes / 2**20:,.1f} MiB): {result.architecture}, {result.weights}"
    )
    if result.without_vision:
        click.echo("the vision encoder is left out: llama.cpp reads it from a separate file (mmproj)")
    if context < trained:
        click.echo(
            f"context {context:,} instead of {trained:,} tokens: llama.cpp's {result.architecture!r} attends to all "
            "of them, where the model has a sliding window"
        )
    if result.decompresses_cache:
        click.echo(
            f"llama.cpp caches the keys and values of {result.architecture} decompressed; edgekv export onnx caches "
            "its latent"
        )
