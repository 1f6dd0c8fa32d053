"""Small random models of the architectures that are born with MLA and that llama.cpp runs decompressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.spec import MLA, RopeSpec
from edgekv.tensors import layer_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

LETTERS = [*BYTE_OF_LETTER, "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
DIM, FFN_DIM, N_LAYERS, N_HEADS = 128, 96, 3, 4


def write_native_mla(path: Path, arch: str, seed: int = 0, tied: bool = True) -> Path:
    """A minicpm3 or plm GGUF in F32, as llama.cpp's converters lay it out."""
    attention = MLA(N_HEADS, 64, 32, DIM // N_HEADS, RopeSpec(10000.0, 32), 48 if arch == "minicpm3" else 0)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(1024)
    writer.add_embedding_length(DIM)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(FFN_DIM)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(LETTERS))
    writer.add_kv_lora_rank(attention.kv_lora_rank)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.value_dim)
    writer.add_rope_dimension_count(attention.rope.dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(LETTERS)
    writer.add_token_types([1] * (len(LETTERS) - 3) + [3, 3, 3])
    writer.add_token_merges(["a b"])
    if arch == "minicpm3":
        writer.add_q_lora_rank(attention.q_lora_rank)
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", rng.uniform(1, 4, 16).astype(np.float32))
    ffn = "relu_squared" if arch == "plm" else "swiglu"
    shapes = layer_tensor_shapes(attention, DIM, FFN_DIM, ffn)
    (h, r, n), (_, v, _) = (shapes.pop(f"attn_{kind}_b.weight") for kind in "kv")
    shapes["attn_kv_b.weight"] = (h * (n + v), r)

    def add(name: str, shape: tuple[int, ...], scale: float) -> None:
        noise = rng.standard_normal(shape) * scale + (1.0 if "norm" in name else 0.0)
        writer.add_tensor(name, noise.astype(np.float32))

    add("token_embd.weight", (len(LETTERS), DIM), 0.1)
    for i in range(N_LAYERS):
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}", shape, 0.2 if name.startswith("attn") else 0.1)
    add("output_norm.weight", (DIM,), 0.1)
    if not tied:
        add("output.weight", (len(LETTERS), DIM), 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session", params=["minicpm3", "plm"])
def native_mla(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random minicpm3, then a plm."""
    return write_native_mla(tmp_path_factory.mktemp("native") / f"{request.param}.gguf", request.param)


@pytest.fixture(scope="session")
def make_native_mla() -> Callable[..., Path]:
    """The factory behind `native_mla`: (path, arch, seed, tied) -> path."""
    return write_native_mla
