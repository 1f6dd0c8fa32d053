"""`edgekv convert` to what is no GGUF for llama.cpp: an ONNX folder, or an .edgekv file and what takes one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.models.onnx.manifest import read_manifest
from edgekv.models.open import open_model

QUICK = ("--target", "0.75", "--text-tokens", "256")
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def intermediate(
    edgekv: Callable[..., Result], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("intermediate")
    out, text = folder / "small.edgekv", folder / "text.txt"
    text.write_text("the quick brown fox " * 40)
    result = edgekv("convert", tiny_llama, "-o", out, *QUICK, "--text", text, "--weights", "f32")
    assert result.returncode == 0, result.stderr
    assert "rope dims" in result.stdout
    return out


def test_from_a_model_to_a_chat(edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-0.5"
    result = edgekv(
        "convert", tiny_llama, "-o", out, *QUICK, "--weights", "int8", "--cache-type", "int8", "--json"
    )
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["cache_bytes_per_token"] == {"before": 3 * 128 * 2, "after": 3 * 96 * 2}
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert all(layer["rope_dim"] % 8 == 0 for layer in found["layers"])
    record = read_manifest(out).model
    assert (record.cache_nbytes, record.cache_type, record.weights) == (3 * (96 + 4), "int8", "int8")
    said = edgekv("chat", out, "-p", "ab", "--max-tokens", "4", "--temp", "0")
    assert said.returncode == 0, said.stderr


def test_an_intermediate_file(
    edgekv: Callable[..., Result], intermediate: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    out = intermediate
    assert open_model(out).spec.arch == "edgekv"
    shown = json.loads(edgekv("inspect", out, "--json").stdout)
    assert shown["cache"]["values_per_token_per_layer"] == 96
    assert shown["made_by"]["edgekv.method"] == "encoded"
    compared = edgekv("verify", out, tiny_llama, "--backend-b", "reference", "--text-tokens", "16", "--json")
    assert 0 < json.loads(compared.stdout)["kl"] < 10
    folder = tmp_path / "onnx"
    assert edgekv("export", "onnx", out, "-o", folder, "--weights", "f32").returncode == 0
    same = edgekv("verify", out, folder, "--text-tokens", "16", "--json")
    assert abs(json.loads(same.stdout)["kl"]) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "phrase"),
    [
        ("x", ("--method", "transmla"), "--method transmla is for GGUF files"),
        ("x", ("--nope-dim", "8"), "--nope-dim is for GGUF files"),
        ("x", ("--value-dim", "8"), "--value-dim is for GGUF files"),
        ("x", ("--verify",), "--verify is for GGUF files"),
        ("x", ("--fold-biases",), "--fold-biases is for GGUF files"),
        ("x", ("--weights", "q4_0"), "whose --weights are keep, f32, int8, int4"),
        ("x.edgekv", ("--weights", "int8"), "whose --weights are keep, f32"),
        ("x.edgekv", ("--cache-type", "int8"), "--cache-type int8 is for"),
        ("x", ("--rope-dim", "66"), "from 2 to 64"),
        ("x", ("--rope-dim", "3"), "it is even"),
        ("x.gguf", ("--cache-type", "int8"), "--cache-type"),
        ("x.gguf", ("--weights", "int8"), "--weights"),
    ],
)
def test_options_that_mean_nothing_here(
    refused: Callable[..., str],
    tiny_llama: Path,
    tmp_path: Path,
    name: str,
    options: tuple[str, ...],
    phrase: str,
) -> None:
    assert phrase in refused("convert", tiny_llama, "-o", tmp_path / name, *QUICK, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "phrase"),
    [
        ((), "say how small"),
        (("--target", "0.5", "--kv-lora-rank", "8"), "say how small"),
        (("--target", "0.01"), "the smallest target for this model is 0.250"),
        (("--target", "2"), "between 0 and 1"),
        (("--kv-lora-rank", "129"), "takes 1 to 128"),
        (("--target", "0.25", "--rope-dim", "32"), "leaves nothing of 32 values to the latent"),
    ],
)
def test_impossible_sizes(
    refused: Callable[..., str], tiny_llama: Path, tmp_path: Path, sizes: tuple[str, ...], phrase: str
) -> None:
    assert phrase in refused("convert", tiny_llama, "-o", tmp_path / "x", *sizes)


def test_what_is_there_is_not_replaced(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    assert "exists; pass --force" in refused("convert", tiny_llama, "-o", tmp_path, *QUICK)
    assert "holds something else" in refused(
        "convert", tiny_llama, "-o", tiny_llama.parent, *QUICK, "--force"
    )


def test_llama_cpp_refuses_it(refused: Callable[..., str], intermediate: Path) -> None:
    said = refused("chat", intermediate, "--backend", "llama.cpp", "-p", "a")
    assert "edgekv export onnx" in said
