"""`edgekv export gguf`: a Hugging Face folder, or another GGUF, as one file that llama.cpp runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgekv.cli.common.bar import progress

PATH = click.Path(path_type=Path)
PLAIN = ("as-stored", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # written by gguf-py
MIXES = (  # llama.cpp's presets that do without an importance matrix
    *("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s"),
    *("iq3_m", "iq3_s", "q2_k"),
)


@click.command("gguf")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The GGUF to write.")
@click.option("--weights", default="as-stored", show_default=True, type=click.Choice(PLAIN + MIXES),
              metavar="FORMAT", help=f"Weight format: {', '.join(PLAIN + MIXES)}.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path, output: Path, weights: str, force: bool, as_json: bool) -> None:
    """Write a model as the GGUF that unmodified llama.cpp runs, tokenizer and chat template included.

    Models with a native latent cache go out with it (deepseek2); others as what they are. as-stored copies the
    weights bit by bit. From q6_k on llama.cpp mixes formats (it has to be installed); edgekv quantize writes the
    same mixes, weighs errors by what the model's inputs are like, and shows them.

    \b
    edgekv export gguf SmolLM2-135M-Instruct -o smollm2.gguf
    edgekv export gguf Qwen2.5-0.5B-Instruct -o qwen.gguf --weights q8_0
    edgekv export gguf Llama-3.2-1B-Instruct -o llama.gguf --weights q4_k_m
    """
    from edgekv.export.gguf.quantize import write_mix
    from edgekv.export.gguf.write import stored_weights, write_gguf
    from edgekv.files import check_output
    from edgekv.models.gguf.spec import JOINT_KV_B
    from edgekv.models.hf.vision import reads_pictures
    from edgekv.models.open import open_source, open_with_tokenizer

    check_output(output, force)
    source = open_with_tokenizer(model)
    chosen = stored_weights(source) if weights == "as-stored" else weights
    with progress("writing", as_json) as advance:
        if weights in MIXES:
            write_mix(source, output, weights, force, advance)
        else:
            write_gguf(source, output, chosen, {}, force, advance)
    written = open_source(output).spec
    nbytes = output.stat().st_size
    if as_json:
        found = {"output": str(output), "architecture": written.arch, "weights": chosen, "bytes": nbytes}
        found |= {"context_length": written.context_length}
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"wrote {output} ({nbytes / 2**20:,.1f} MiB): {written.arch}, {chosen}")
    if model.is_dir() and reads_pictures(model):
        click.echo("what reads pictures stays behind: llama.cpp takes it from a file of its own (mmproj)")
    if written.context_length < source.spec.context_length:
        click.echo(
            f"context {written.context_length:,} instead of {source.spec.context_length:,} tokens: llama.cpp's "
            f"{written.arch!r} attends to all of them, where the model has a sliding window"
        )
    if written.arch in JOINT_KV_B:
        click.echo(
            f"llama.cpp caches the keys and values of {written.arch} decompressed; edgekv export onnx caches "
            "its latent"
        )
