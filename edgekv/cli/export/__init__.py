"""`edgekv export`: one subcommand per format."""

from __future__ import annotations

import click

from edgekv.cli.common.lazy import LazyGroup

FORMATS = {  # name: one line for `edgekv export --help`; its command lives in edgekv/cli/export/<name>.py
    "gguf": "A GGUF that unmodified llama.cpp runs, from a Hugging Face folder.",
    "onnx": "A folder that onnxruntime runs, no compiler needed.",
    "safetensors": "A DeepseekV3 folder that unmodified transformers loads and runs.",
}


@click.group(
    cls=LazyGroup,
    modules="edgekv.cli.export.",
    lines=FORMATS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Write a model in another format.

    \b
    edgekv export gguf Qwen2.5-0.5B-Instruct -o qwen.gguf
    edgekv export onnx model.gguf -o model-onnx
    edgekv export safetensors small.gguf -o small-hf
    """
