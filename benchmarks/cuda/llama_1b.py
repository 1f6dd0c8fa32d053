"""Llama-3.2-1B's shape with random weights, as GQA and as MLA with a 256 + 64 latent: python llama_1b.py FOLDER

Speed and memory do not depend on what the weights say. The latent's 320 and 256 wide heads are what
llama.cpp's CUDA flash attention has a kernel for (32 query heads to one latent).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgekv.convert.layers import converted_source
from edgekv.convert.target import target_spec
from edgekv.export.gguf.write import write_gguf
from edgekv.source import Array, LazySource
from edgekv.spec import GQA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes

DIM, FFN_DIM, N_LAYERS, N_VOCAB = 2048, 8192, 16, 128256
ATTENTION = GQA(32, 8, 64, RopeSpec(500000.0, 64))
RANK, ROPE_DIM, NOPE_DIM = 256, 64, 64
BLOCK = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float32)


def noise(*shape: int) -> Array:
    """Weights that repeat a block of random ones: fast to make."""
    return np.resize(BLOCK, shape)


def gqa() -> LazySource:
    """The original's shape."""
    letters = [chr(0x100 + i) for i in range(256)]
    tokens = [*letters, *(f"<filler{i}>" for i in range(N_VOCAB - 257)), "<|end|>"]
    metadata = {
        "general.name": "random weights in the shape of Llama-3.2-1B",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [5] * (N_VOCAB - 257) + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": N_VOCAB - 1,
    }
    layers = (LayerSpec(ATTENTION, FFN_DIM),) * N_LAYERS
    spec = ModelSpec("llama", "llama-1b-shape", layers, DIM, N_VOCAB, 131072, 1e-5, True)
    source = LazySource(spec, metadata)
    source.add_array("token_embd.weight", noise(N_VOCAB, DIM))
    for i in range(N_LAYERS):
        for name, shape in layer_tensor_shapes(ATTENTION, DIM, FFN_DIM).items():
            source.add_array(
                f"blk.{i}.{name}", np.ones(shape, np.float32) if "norm" in name else noise(*shape)
            )
    source.add_array("output_norm.weight", np.ones(DIM, np.float32))
    return source


def main() -> None:
    folder = Path(sys.argv[1])
    source = gqa()
    target = target_spec(ATTENTION, RANK, ROPE_DIM, NOPE_DIM, ATTENTION.head_dim)
    shapes = layer_tensor_shapes(target, DIM, FFN_DIM)

    def fitted(name: str) -> Array:
        return noise(*shapes[name.split(".", 2)[2]])

    load: Callable[[str], Array] = fitted
    for name, model in (("llama-1b", source), ("llama-1b-mla-256", converted_source(source, target, load))):
        write_gguf(model, folder / f"{name}-q8_0.gguf", "q8_0", {}, True, lambda *_: None)
        print(name, flush=True)


if __name__ == "__main__":
    main()
