"""Hugging Face folders as GGUF: llama.cpp against transformers, and the GGUF read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.cli.main import cli
from edgekv.errors import InputError, UnsupportedError
from edgekv.export.gguf.write import write_gguf
from edgekv.models.hf.source import HFSource
from edgekv.models.open import open_model
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.tokenizer.tokenizer import Tokenizer

from .conftest import MODELS, TOKENS, WITH_PICTURES, Zoo

REFUSED = {"deepseek2-grouped": "two best experts", "kimi-k2-ramp": "ramp between 32 turns and 1.*beta_fast"}
WINDOWS = {
    "mistral": 24,
    "ministral": 24,
    "qwen3-window": 20,
    "phi": 24,
    "qwen2-window": 20,
    "mistral3-pictures": 24,
}  # llama.cpp has none for these


def export(zoo: Zoo, name: str, folder: Path, weights: str = "f32") -> Path:
    path = folder / f"{name}.gguf"
    write_gguf(HFSource(zoo.folder(name)), path, weights, {}, False, lambda *_: None)
    return path


@pytest.mark.parametrize("name", [name for name in (*MODELS, *WITH_PICTURES) if name not in REFUSED])
def test_llama_cpp_gives_transformers_distribution(name: str, zoo: Zoo, tmp_path: Path) -> None:
    path = export(zoo, name, tmp_path)
    read = open_model(path)
    n_tokens = WINDOWS.get(name, len(TOKENS))
    assert read.spec.context_length == WINDOWS.get(name, HFSource(zoo.folder(name)).spec.context_length)
    tokens, wanted = TOKENS[:n_tokens].tolist(), zoo.logits(name)[:n_tokens]

    model = ReferenceModel(read)
    assert np.abs(model.logits(model.hidden(tokens, model.new_cache(n_tokens))) - wanted).max() <= 1e-4

    engine = LlamaCppBackend(path, n_ctx=n_tokens, cache_type="f32", n_threads=1)
    try:
        given = log_softmax(engine.prefill_all(tokens))
    finally:
        engine.close()
    true = log_softmax(wanted)
    assert float((np.exp(true) * (true - given)).sum(-1).mean()) <= 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        export(zoo, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_windowed_cache_cannot_be_saved(zoo: Zoo, tmp_path: Path) -> None:
    engine = LlamaCppBackend(export(zoo, "gemma2", tmp_path), n_ctx=256, n_threads=1)
    with pytest.raises(
        UnsupportedError, match=r"more of this model than one plain cache .*; it cannot be saved"
    ):
        engine.layout()
    assert engine.n_past == 0
    engine.prefill(TOKENS[:5].tolist())
    with pytest.raises(UnsupportedError):
        engine.save()
    engine.close()


def test_gemma2_has_the_embedding_for_its_head(zoo: Zoo, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo.folder("gemma2"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="the embedding for its head"):
        write_gguf(HFSource(folder), tmp_path / "x.gguf", "f32", {}, False, lambda *_: None)


@pytest.mark.parametrize("name", ["phi-longrope", "minicpm3-longrope"])
def test_longrope_is_read_within_its_first_range(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """llama.cpp's converter gives the whole context, beyond whose first part other factors hold."""
    path = export(zoo, name, tmp_path)
    trained = open_model(path).spec
    field = gguf.GGUFReader(path, "r+").fields[f"{trained.arch}.context_length"]
    field.parts[field.data[0]][0] = 4 * trained.context_length
    assert open_model(path).spec == trained


def test_command_writes_a_complete_model(zoo: Zoo, tmp_path: Path) -> None:
    folder, out = zoo.folder("qwen2"), tmp_path / "qwen2.gguf"
    args = ["export", "gguf", str(folder), "-o", str(out), "--json"]
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert (found["architecture"], found["weights"], found["bytes"]) == ("qwen2", "f32", out.stat().st_size)
    source = open_model(out)
    assert source.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert source.metadata["tokenizer.chat_template"] == "{{ messages }}"
    original = HFSource(folder)
    for name in original.names():
        assert np.array_equal(source.load(name), original.load(name)), name
    engine = LlamaCppBackend(out, n_ctx=32, cache_type="f16", n_threads=1)
    try:
        text = "Hello 2 you, it's fine"
        assert engine.language().encode(text) == Tokenizer.from_metadata(original.metadata).encode(text)
    finally:
        engine.close()
    with pytest.raises(InputError, match="--force"):
        CliRunner().invoke(cli, args, catch_exceptions=False)


def test_minicpm3_keeps_its_latent_where_llama_cpp_can(zoo: Zoo, tmp_path: Path) -> None:
    for name in ("minicpm3", "minicpm3-equal"):
        assert open_model(export(zoo, name, tmp_path)).spec.arch == "deepseek2"
    args = ["export", "gguf", str(zoo.folder("minicpm3-longrope")), "-o", str(tmp_path / "x.gguf")]
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert "minicpm3, f32" in result.output
    assert "edgekv export onnx caches its latent" in " ".join(result.output.split())


def test_what_is_left_out_is_told(zoo: Zoo, tmp_path: Path) -> None:
    args = ["export", "gguf", str(zoo.folder("mistral")), "-o", str(tmp_path / "x.gguf")]
    said = " ".join(CliRunner().invoke(cli, args, catch_exceptions=False).output.split())
    assert "context 24 instead of 256 tokens: llama.cpp's 'llama' attends to all" in said
    found = json.loads(CliRunner().invoke(cli, [*args, "--force", "--json"], catch_exceptions=False).output)
    assert found["context_length"] == 24
    args[2:] = [str(zoo.folder("gemma3-pictures")), "-o", str(tmp_path / "z.gguf")]
    assert "the vision encoder is left out" in CliRunner().invoke(cli, args, catch_exceptions=False).output
    args[2:] = [str(zoo.folder("qwen2")), "-o", str(tmp_path / "y.gguf")]
    assert "instead of" not in CliRunner().invoke(cli, args, catch_exceptions=False).output


def test_a_failure_leaves_nothing_behind(zoo: Zoo, tmp_path: Path) -> None:
    def fail(done: int, total: int, *_: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(HFSource(zoo.folder("qwen2")), tmp_path / "x.gguf", "f32", {}, False, fail)
    assert not list(tmp_path.iterdir())


def test_weights_smaller_than_stored(zoo: Zoo, tmp_path: Path) -> None:
    source = open_model(export(zoo, "llama3", tmp_path, "q8_0"))
    assert source.quantization("blk.0.ffn_up.weight") == "Q8_0"
    original = HFSource(zoo.folder("llama3")).load("blk.0.ffn_up.weight")
    assert np.abs(source.load("blk.0.ffn_up.weight") - original).max() <= np.abs(original).max() / 127


def test_bfloat16_passes_bit_by_bit(zoo: Zoo, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bf16"
    folder.mkdir()
    for file in zoo.folder("llama3").iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(zoo.folder("llama3") / "model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors")
    out = tmp_path / "bf16.gguf"
    result = CliRunner().invoke(cli, ["export", "gguf", str(folder), "-o", str(out)], catch_exceptions=False)
    assert "llama, bf16" in result.output
    original, written = HFSource(folder), open_model(out)
    for name in original.names():
        assert written.quantization(name) == ("F32" if "norm" in name else "BF16"), name
        assert np.array_equal(written.load(name), original.load(name)), name


def test_a_folder_without_a_tokenizer(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((zoo.folder("qwen2") / name).read_bytes())
    with pytest.raises(InputError, match=r"holds no tokenizer; download tokenizer.json"):
        CliRunner().invoke(
            cli, ["export", "gguf", str(folder), "-o", str(tmp_path / "x.gguf")], catch_exceptions=False
        )
