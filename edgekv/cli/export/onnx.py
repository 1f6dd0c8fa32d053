"""`edgekv export onnx`: a folder that onnxruntime runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.progress import stages

if TYPE_CHECKING:
    from edgekv.models.onnx.manifest import Manifest, ModelRecord


@options.command("onnx")
@options.model()
@options.output("The folder to write.")
@click.option("--weights", default="int4", show_default=True, type=click.Choice(["f32", "int8", "int4"]),
              help="Weight format; token embeddings keep 8 bits in int4.")  # fmt: skip
@options.cache_type("How latents are cached; int8 takes a quarter of the memory.", ("f32", "int8"), "f32")
@options.force()
@options.as_json("Print the manifest as JSON.")
def command(output: Path, as_json: bool, **wanted: Any) -> None:
    """Write MODEL as an ONNX graph with its tokenizer, for boards where nothing should be compiled.

    A model with MLA, converted or native (MiniCPM3, PLM), caches its latents alone.

    \b
    edgekv export onnx model.gguf -o model-onnx
    edgekv export onnx small.gguf -o small-onnx --weights int4 --cache-type int8
    edgekv chat small-onnx
    """
    from edgekv.workflows.export import ExportOnnxRequest, export_onnx

    manifest = export_onnx(ExportOnnxRequest(output=output, **wanted), stages(quiet=as_json))
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        _show(manifest, output)


def _show(manifest: Manifest, folder: Path) -> None:
    about = manifest.model
    total = sum(record.nbytes for record in manifest.files.values())
    click.echo(f"model    {about.name}: {about.attention}, {about.n_layers} layers")
    click.echo(f"weights  {about.weights}, {about.weights_nbytes / 1e6:.1f} MB")
    click.echo(f"cache    {about.cache_type}, {about.cache_nbytes} bytes per token{_windows(about)}")
    click.echo(
        f"{folder}: {total / 1e6:.1f} MB in {len(manifest.files)} files; "
        f"talk to it: edgekv chat {shlex.quote(str(folder))}"
    )


def _windows(about: ModelRecord) -> str:
    """What is to say of layers that let tokens go."""
    kept = [layer.slots(about.context_length) for layer in about.layers if layer.window]
    if not kept:
        return ""
    return f"; {len(kept)} of {about.n_layers} layers keep the last {max(kept)} tokens only"
