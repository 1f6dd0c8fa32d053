"""Every family with a latent that is encoded when it is written, against transformers' logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekv.backends.onnxruntime import OnnxBackend
from edgekv.backends.reference import ReferenceBackend
from edgekv.convert.encoded.layers import EncodedTarget, convert_encoded
from edgekv.export.gguf.write import write_gguf
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.gguf.own import SUFFIX
from edgekv.models.onnx.folder import GRAPH
from edgekv.models.onnx.manifest import WINDOW_SLACK
from edgekv.models.open import open_model
from edgekv.reference.ops import kl_rows, log_softmax
from edgekv.source import TensorSource
from edgekv.spec import GQA, MLA

from .conftest import MODELS, N_VOCAB, TOKENS, Zoo

FAMILIES = [name for name in MODELS if not name.startswith(("minicpm3", "deepseek", "kimi", "glm", "youtu"))]
WINDOWS = np.random.default_rng(5).integers(0, N_VOCAB, (20, 80))


def encoded(source: TensorSource, share: float, rope_dim: int | None, folder: Path) -> TensorSource:
    widths = tuple(int(layer.attention.cache_values * share) for layer in source.spec.layers)
    return convert_encoded(source, EncodedTarget(widths, rope_dim), WINDOWS, folder, lambda *_: None)


def kl(source: TensorSource, logits: np.ndarray) -> float:
    ours = ReferenceBackend(source, 128).prefill_all(TOKENS.tolist())
    return float(kl_rows(log_softmax(logits), log_softmax(ours)).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_components_lose_nothing(zoo: Zoo, name: str, tmp_path: Path) -> None:
    source = open_model(zoo.folder(name))
    attention = source.spec.layers[0].attention
    assert isinstance(attention, GQA)
    whole = encoded(source, 1.0, attention.cache_values // 2, tmp_path)
    logits = ReferenceBackend(whole, 128).prefill_all(TOKENS.tolist())
    np.testing.assert_allclose(logits, zoo.logits(name), atol=1e-4 * np.abs(zoo.logits(name)).max())
    assert kl(whole, zoo.logits(name)) < 1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_it_loses_less_than_a_quarter(zoo: Zoo, name: str, tmp_path: Path) -> None:
    source = open_model(zoo.folder(name))
    found = []
    for share in (0.25, 0.5, 0.75):
        folder = tmp_path / str(share)
        folder.mkdir()
        small = encoded(source, share, None, folder)
        assert small.spec.cache_values <= share * source.spec.cache_values
        found.append(kl(small, zoo.logits(name)))
    assert found == sorted(found, reverse=True)
    print(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_gives_the_reference(zoo: Zoo, name: str, tmp_path: Path) -> None:
    source = open_model(zoo.folder(name))
    spill = tmp_path / "spill"
    spill.mkdir()
    small = encoded(source, 0.75, None, spill)
    path = tmp_path / f"small{SUFFIX}"
    write_gguf(small, path, "f32", {}, False, lambda *_: None)
    assert open_model(path).spec == replace(small.spec, name=open_model(path).spec.name)
    for cache, bound in (("f32", 1e-6), ("int8", 1e-2)):
        write_onnx(open_model(path), tmp_path / cache, OnnxOptions("f32", cache), False, lambda *_: None)
        engine = OnnxBackend(tmp_path / cache, n_ctx=128, n_threads=1)
        wanted = ReferenceBackend(small, 128).prefill_all(TOKENS.tolist())
        given = engine.prefill_all(TOKENS.tolist())
        assert float(kl_rows(log_softmax(wanted), log_softmax(given)).mean()) <= bound
        kept = 0
        for attention in (layer.attention for layer in small.spec.layers):
            n_slots = min(attention.window + WINDOW_SLACK, 128) if attention.window else 128
            kept += n_slots * (4 * attention.cache_values if cache == "f32" else attention.cache_values + 4)
        assert engine.cache_nbytes() == kept
        engine.close()


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_are_rings(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """The reference keeps every token; windows here hold 24 of 240. What is trimmed is there, or nothing is."""
    tokens = np.random.default_rng(4).integers(0, N_VOCAB, 240)
    spill = tmp_path / "spill"
    spill.mkdir()
    small = encoded(open_model(zoo.folder(name)), 0.75, None, spill)
    write_onnx(small, tmp_path / "out", OnnxOptions("f32"), False, lambda *_: None)
    engine = OnnxBackend(tmp_path / "out", n_ctx=240, n_threads=1)
    local = sum(bool(layer.attention.window) for layer in small.spec.layers)
    kept = local * (24 + WINDOW_SLACK) + (small.spec.n_layers - local) * 240
    assert engine.cache_nbytes() == kept * small.spec.kv_bytes_per_token("f32") / small.spec.n_layers
    wanted = log_softmax(ReferenceBackend(small, 240).prefill_all(tokens.tolist()))

    def lost(start: int, given: np.ndarray) -> float:
        rows = wanted[start : start + len(given)]
        return float(np.abs(kl_rows(rows, log_softmax(given))).max())

    assert lost(0, engine.prefill_all(tokens[:200].tolist())) <= 1e-6
    assert lost(200, np.stack([engine.decode(token) for token in tokens[200:].tolist()])) <= 1e-6
    for back_to, left in ((240 - WINDOW_SLACK, 240 - WINDOW_SLACK), (180, 180), (100, 0)):
        engine.trim(back_to)
        assert engine.n_past == left
        assert lost(left, engine.prefill_all(tokens[left : left + 30].tolist())) <= 1e-6
    engine.trim(0)
    assert lost(0, engine.prefill_all(tokens.tolist())) <= 1e-6
    engine.close()
    for n_ctx in (23, 24, 30, 88, 89):
        engine = OnnxBackend(tmp_path / "out", n_ctx=n_ctx, n_threads=1)
        assert lost(0, engine.prefill_all(tokens[:n_ctx].tolist())) <= 1e-6
        engine.close()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_makes_rows_keeps_8_bits(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """Without QK-norm one matrix makes a row of the hidden states; behind it there is none of keys and values."""
    small = encoded(open_model(zoo.folder(name)), 0.75, None, tmp_path)
    write_onnx(small, tmp_path / "out", OnnxOptions("int4"), False, lambda *_: None)
    graph = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    attention = small.spec.layers[0].attention
    assert isinstance(attention, MLA)
    assert attention.encoder
    encoder = attention.encoder
    n_rows = 2 * encoder.n_kv_heads * encoder.head_dim if encoder.qk_norm else attention.cache_values
    blocks = small.spec.dim // 32
    assert shapes["layers.0.attn.kv.packed"] == (n_rows, blocks, 32)
    assert shapes["layers.0.attn.q.packed"] == (attention.n_heads * encoder.head_dim, blocks, 16)
    assert ("layers.0.attn.kv_enc" in shapes) == encoder.qk_norm
