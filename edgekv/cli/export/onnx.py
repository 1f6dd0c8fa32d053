"""`edgekv export onnx`: a folder that onnxruntime runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekv.cli.common.bar import progress

if TYPE_CHECKING:
    from edgekv.export.onnx.weights import LatentCache, Weights
    from edgekv.models.onnx.manifest import Manifest

PATH = click.Path(path_type=Path)


@click.command("onnx")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The folder to write.")
@click.option("--weights", default="int4", show_default=True, type=click.Choice(["fp32", "int8", "int4"]),
              help="Weight format; token embeddings keep 8 bits in int4.")  # fmt: skip
@click.option("--cache", default="f32", show_default=True, type=click.Choice(["f32", "int8"]),
              help="How latents are cached; int8 takes a quarter of the memory.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    model: Path, output: Path, weights: Weights, cache: LatentCache, force: bool, as_json: bool
) -> None:
    """Write MODEL as an ONNX graph with its tokenizer, for boards where nothing should be compiled.

    A model with MLA, converted or native (MiniCPM3, PLM), caches its latents alone.

    \b
    edgekv export onnx model.gguf -o model-onnx
    edgekv export onnx small.gguf -o small-onnx --weights int4 --cache int8
    edgekv chat small-onnx
    """
    from edgekv.export.onnx.write import OnnxOptions, write_onnx
    from edgekv.models.open import open_source

    source = open_source(model)
    with progress("exporting", as_json) as advance:
        manifest = write_onnx(source, output, OnnxOptions(weights, cache), force, advance)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        _show(manifest, output)


def _show(manifest: Manifest, folder: Path) -> None:
    about = manifest.model
    total = sum(record.nbytes for record in manifest.files.values())
    click.echo(f"model    {about.name}: {about.attention}, {about.n_layers} layers")
    click.echo(f"weights  {about.weights}, {about.weights_nbytes / 1e6:.1f} MB")
    click.echo(f"cache    {about.cache_type}, {about.cache_nbytes} bytes a token")
    click.echo(
        f"{folder}: {total / 1e6:.1f} MB in {len(manifest.files)} files; talk to it: edgekv chat {folder}"
    )
