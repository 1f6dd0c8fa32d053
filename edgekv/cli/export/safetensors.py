"""`edgekv export safetensors`: an MLA model as a folder that transformers loads."""

from __future__ import annotations

from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json
from edgekv.cli.common.progress import stages


@options.command("safetensors")
@options.model()
@options.output("The folder to write.")
@click.option("--healed", type=options.PATH,
              help="File of `edgekv heal` to build from; MODEL is then its original.")  # fmt: skip
@click.option("--weights", default="bf16", show_default=True, type=click.Choice(["f32", "bf16", "f16"]),
              help="Weight format; f32 loses nothing.")  # fmt: skip
@options.force()
@options.as_json()
def command(as_json: bool, **wanted: Any) -> None:
    """Write a converted model in DeepseekV3 format.

    Unmodified transformers loads and runs the folder: config, weights, tokenizer with chat template.

    \b
    edgekv convert model.gguf -o half.gguf --target 0.5
    edgekv export safetensors half.gguf -o half-hf
    edgekv export safetensors model.gguf --healed third.safetensors -o third-hf --weights f32
    """
    from edgekv.workflows.export import ExportSafetensorsRequest, export_safetensors

    result = export_safetensors(ExportSafetensorsRequest(**wanted), stages(quiet=as_json))
    if as_json:
        print_json({"output": str(result.output), "dtype": result.weights, "bytes": result.nbytes})
    else:
        mib = sum(result.nbytes.values()) / 2**20
        click.echo(f"wrote {result.output} ({mib:,.1f} MiB): {', '.join(result.nbytes)}")
