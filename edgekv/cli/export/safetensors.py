"""`edgekv export safetensors`: an MLA model as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekv.cli.common.bar import progress

if TYPE_CHECKING:
    from edgekv.export.deepseek.safetensors_file import DType

PATH = click.Path(path_type=Path)
DTYPES = ("float32", "bfloat16", "float16")


@click.command("safetensors")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The folder to write.")
@click.option("--healed", type=PATH, help="File of `edgekv heal` to build from; MODEL is then its original.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(DTYPES),
              help="Of the weights; float32 loses nothing.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path, output: Path, healed: Path | None, dtype: DType, force: bool, as_json: bool) -> None:
    """Write a converted model in DeepseekV3 format.

    Unmodified transformers loads and runs the folder: config, weights, tokenizer with chat template.

    \b
    edgekv convert model.gguf -o half.gguf --target 0.5
    edgekv export safetensors half.gguf -o half-hf
    edgekv export safetensors model.gguf --healed third.safetensors -o third-hf --dtype float32
    """
    from edgekv.export.deepseek.write import write_deepseek
    from edgekv.models.open import open_source

    source = open_source(model)
    if healed is not None:
        from edgekv.heal.weights import load_healed

        source = load_healed(healed, source)
    with progress("writing", as_json) as advance:
        names = write_deepseek(source, output, dtype, force, advance)
    nbytes = {name: (output / name).stat().st_size for name in names}
    if as_json:
        click.echo(json.dumps({"output": str(output), "dtype": dtype, "bytes": nbytes}, indent=1))
    else:
        click.echo(f"wrote {output} ({sum(nbytes.values()) / 2**20:,.1f} MiB): {', '.join(names)}")
