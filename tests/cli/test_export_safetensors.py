"""`edgekv export safetensors` as a user meets it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Result = subprocess.CompletedProcess[str]
FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors",
}


def test_export(edgekv: Callable[..., Result], tiny_mla: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = edgekv("export", "safetensors", tiny_mla, "-o", out, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dtype"] == "bf16"
    assert {path.name: path.stat().st_size for path in out.iterdir()} == report["bytes"]
    assert set(report["bytes"]) == FILES
    assert json.loads((out / "config.json").read_text())["kv_lora_rank"] == 32
    again = edgekv("export", "safetensors", tiny_mla, "-o", out, "--force", "--weights", "f32")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"wrote {out}")
    assert (out / "model.safetensors").stat().st_size > 1.9 * report["bytes"]["model.safetensors"]


def test_bad_input(refused: Callable[..., str], tiny_llama: Path, tiny_mla: Path, tmp_path: Path) -> None:
    command = ("export", "safetensors")
    assert "there is no such file" in refused(*command, tmp_path / "no.gguf", "-o", tmp_path / "out")
    assert "edgekv convert" in refused(*command, tiny_llama, "-o", tmp_path / "out")
    assert "exists; pass --force" in refused(*command, tiny_mla, "-o", tmp_path)
    assert "does not exist" in refused(*command, tiny_mla, "-o", tmp_path / "no" / "out")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert "bad.safetensors" in refused(
        *command, tiny_llama, "--healed", tmp_path / "bad.safetensors", "-o", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
