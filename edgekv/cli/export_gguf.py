"""`edgekv export gguf`: a Hugging Face folder, or another GGUF, as one file that llama.cpp runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgekv.cli.progress import progress

PATH = click.Path(path_type=Path)
WEIGHTS = ("as-stored", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@click.command("gguf")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The GGUF to write.")
@click.option("--weights", default="as-stored", show_default=True, type=click.Choice(WEIGHTS),
              help="Weight format; edgekv quantize has more.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path, output: Path, weights: str, force: bool, as_json: bool) -> None:
    """Write a model as the GGUF that unmodified llama.cpp runs, tokenizer and chat template included.

    Models with a native latent cache go out with it (deepseek2); others as what they are.

    \b
    edgekv export gguf SmolLM2-135M-Instruct -o smollm2.gguf
    edgekv export gguf Qwen2.5-0.5B-Instruct -o qwen.gguf --weights q8_0
    """
    from edgekv.errors import ModelFileError
    from edgekv.export.gguf import stored_weights, write_gguf
    from edgekv.files import check_output
    from edgekv.gguf_spec import JOINT_KV_B
    from edgekv.source import open_source

    check_output(output, force)
    source = open_source(model)
    if "tokenizer.ggml.tokens" not in source.metadata:
        raise ModelFileError(f"{model}: holds no tokenizer; download tokenizer.json into the folder")
    chosen = stored_weights(source) if weights == "as-stored" else weights
    with progress("writing", as_json) as advance:
        write_gguf(source, output, chosen, {}, force, lambda name, i, n: advance(i + 1, n))
    written = open_source(output).spec.arch
    nbytes = output.stat().st_size
    if as_json:
        found = {"output": str(output), "architecture": written, "weights": chosen, "bytes": nbytes}
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(f"wrote {output} ({nbytes / 2**20:,.1f} MiB): {written}, {chosen}")
        if written in JOINT_KV_B:
            click.echo(
                f"llama.cpp caches the keys and values of {written} decompressed; edgekv export onnx caches "
                "its latent"
            )
