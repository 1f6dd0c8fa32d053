"""A model that was trained with MLA, stock llama.cpp beside the kernel: the shape of DeepSeek-V2-Lite, random weights.

    python benchmarks/kernel/native_mla.py -o native-mla.json

Writes a GGUF file with 16 heads, a latent of 512 and a rope key of 64 values (arXiv 2405.04434), and measures it at
depths 0 and 16,384 as benchmarks/kernel_speed.py does. Speed depends on shapes and not on values. Layers are dense,
with as many feed-forward weights as the original's 6 + 2 experts that run per token; 4 of the 27 layers and as large a
part of the vocabulary, so that attention has the share of a token that it has in the original. Q4_0 weights, 220 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from edgekv.export.gguf.write import write_gguf
from edgekv.source import LazySource
from edgekv.spec import MLA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

SPEED = Path(__file__).parents[1] / "kernel_speed.py"
ATTENTION = MLA(n_heads=16, kv_lora_rank=512, nope_dim=128, value_dim=128, rope=RopeSpec(10_000.0, 64))
DIM, EXPERT_DIM, N_EXPERTS, VOCAB, N_LAYERS = 2048, 1408, 8, 102_400, 27


def write_model(path: Path, n_layers: int) -> None:
    """A slice of DeepSeek-V2-Lite's shape, `n_layers` deep."""
    vocab = VOCAB * n_layers // N_LAYERS // 32 * 32
    layers = (LayerSpec(ATTENTION, N_EXPERTS * EXPERT_DIM),) * n_layers
    spec = ModelSpec("deepseek2", "native-mla", layers, DIM, vocab, 32_768, 1e-6, tied_embeddings=False)
    source = LazySource(spec, _vocabulary(vocab))
    rng = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...]) -> None:
        scale, middle = (0.1, 1.0) if "norm" in name else (shape[-1] ** -0.5, 0.0)
        source.add(
            name,
            shape,
            lambda: rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(middle),
        )

    add("token_embd.weight", (vocab, DIM))
    add("output_norm.weight", (DIM,))
    add("output.weight", (vocab, DIM))
    for i, layer in enumerate(layers):
        for name, shape in layer_tensor_shapes(ATTENTION, DIM, layer.ffn_dim).items():
            add(f"blk.{i}.{name}", shape)
    write_gguf(source, path, "q4_0", {}, True, lambda *_: None)


def _vocabulary(size: int) -> dict[str, object]:
    """Bytes, and unused tokens up to the size."""
    letters = list(BYTE_OF_LETTER)
    n_fillers = size - len(letters) - 1
    return {
        "general.name": "native-mla",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*letters, *(f"<filler{i}>" for i in range(n_fillers)), "<|end|>"],
        "tokenizer.ggml.token_type": [1] * len(letters) + [5] * n_fillers + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": size - 1,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def main() -> None:
    """Write the model, measure it, and leave the result in the output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cache-types", default="f16,q8_0,q4_0")
    parser.add_argument("--depths", default="0 16384")
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--prefilled", default="32", help="tokens prefilled per run, at once")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native-mla.gguf"
        write_model(path, options.layers)
        case = f"DeepSeek-V2-Lite, {options.layers} layers={path}:{options.cache_types}"
        command = [sys.executable, str(SPEED), "--case", case, "--depths", *options.depths.split()]
        command += [
            "--rounds",
            options.rounds,
            "--threads",
            options.threads,
            "--prefilled",
            options.prefilled,
        ]
        subprocess.run([*command, "-o", str(options.output)], check=True)


if __name__ == "__main__":
    main()
