"""`edgekv export` as a user meets it, and chat with what it wrote."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Result = subprocess.CompletedProcess[str]


def test_export_and_chat(edgekv: Callable[..., Result], smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-onnx"
    result = edgekv("export", "onnx", smollm2, "-o", folder)
    assert result.returncode == 0, result.stderr
    assert f"edgekv chat {folder}" in result.stdout
    question = ("-p", "What is the capital of France?", "--temp", "0", "-n", "12", "-c", "256", "-t", "1")
    chat = edgekv("chat", folder, *question, "--json")
    assert chat.returncode == 0, chat.stderr
    answer = json.loads(chat.stdout)
    assert answer["backend"] == "onnx"
    assert "Paris" in answer["text"]
    assert answer["cache_nbytes"] == 256 * 30 * 2 * 3 * 64 * 4


def test_verify_compares_a_folder_with_its_model(
    edgekv: Callable[..., Result], tiny_mla: Path, tmp_path: Path
) -> None:
    assert edgekv("export", "onnx", tiny_mla, "-o", tmp_path / "out", "--weights", "f32").returncode == 0
    command = ("verify", tiny_mla, tmp_path / "out", "--text-tokens", "32", "--tolerance", "1e-6", "--json")
    result = edgekv(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["argmax_agreement"] == 1


def test_the_manifest_as_json(edgekv: Callable[..., Result], tiny_mla: Path, tmp_path: Path) -> None:
    result = edgekv("export", "onnx", tiny_mla, "-o", tmp_path / "out", "--cache-type", "int8", "--json")
    manifest = json.loads(result.stdout)
    assert manifest["model"]["cache_type"] == "int8"
    assert manifest["model"]["cache_nbytes"] == 3 * (64 + 4)
    assert manifest == json.loads((tmp_path / "out" / "edgekv.json").read_text())


def test_bad_input(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    assert "no such file" in refused("export", "onnx", tmp_path / "no.gguf", "-o", tmp_path / "out")
    assert "exists" in refused("export", "onnx", tiny_llama, "-o", tmp_path)
    assert "run `edgekv convert` first" in refused(
        "export", "onnx", tiny_llama, "-o", tmp_path / "out", "--cache-type", "int8"
    )
    assert not (tmp_path / "out").exists()
