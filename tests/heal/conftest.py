"""A small random GQA model that predicts its text badly but decidedly, and an MLA student of it."""

from pathlib import Path

import numpy as np
import pytest

from edgekv.export.gguf.write import write_gguf
from edgekv.source import Array, LazySource
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

DIM, FFN, LAYERS, HEADS, GROUPS, HEAD_DIM = 64, 96, 3, 4, 2, 32
LETTERS = list(BYTE_OF_LETTER)
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


class Tiny:
    """The models of these tests."""

    layers = LAYERS
    spec = MLA(HEADS, 32, 16, HEAD_DIM, RopeSpec(10000.0, 32))

    def source(self) -> LazySource:
        return random_source()

    def student(self, seed: int = 1) -> dict[str, Array]:
        """Random student tensors, stacked over layers."""
        a, rng = self.spec, np.random.default_rng(seed)
        shapes = {
            "q": (LAYERS, HEADS * a.head_dim, DIM),
            "kv_a": (LAYERS, a.cache_values, DIM),
            "k_b": (LAYERS, HEADS, a.kv_lora_rank, a.nope_dim),
            "v_b": (LAYERS, HEADS, HEAD_DIM, a.kv_lora_rank),
            "output": (LAYERS, DIM, HEADS * HEAD_DIM),
        }
        return {name: noise(rng, *shape, scale=0.2) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


def random_source(seed: int = 0) -> LazySource:
    attention = GQA(HEADS, GROUPS, HEAD_DIM, RopeSpec(10000.0, HEAD_DIM))
    tokens = [*LETTERS, "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    spec = ModelSpec(
        "llama", "tiny", (LayerSpec(attention, FFN),) * LAYERS, DIM, len(tokens), 256, 1e-5, True
    )
    metadata = {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.chat_template": CHAT,
    }
    rng = np.random.default_rng(seed)
    source = LazySource(spec, metadata)
    source.add_array("token_embd.weight", noise(rng, len(tokens), DIM, scale=0.3))
    for i in range(LAYERS):
        for name, shape in layer_tensor_shapes(attention, DIM, FFN).items():
            array = noise(rng, *shape, scale=0.15) + np.float32("norm" in name)
            source.add_array(f"blk.{i}.{name}", array)
    source.add_array("output_norm.weight", 1 + noise(rng, DIM, scale=0.1))
    return source


def noise(rng: np.random.Generator, *shape: int, scale: float) -> Array:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(random_source(), path, "f32", {}, False, lambda *_: None)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 documents of 2000 random letters."""
    rng = np.random.default_rng(3)
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-äöüß")
    documents = ["".join(rng.choice(letters, 2000)) for _ in range(20)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n\n".join(documents), encoding="utf-8")
    return path
