"""`hf:` on the command line: pull, models, and a MODEL that lies on a Hub."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.errors import InputError

NAME = "hf:owner/tiny-GGUF"


@pytest.fixture
def published(hub: Any, tiny_llama: Path) -> Any:
    """The tiny llama on the Hub."""
    hub.repos["owner/tiny-GGUF"] = hub.Repo({"tiny-f32.gguf": tiny_llama.read_bytes()})
    return hub


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
    return result.stdout


def test_pull_prints_the_path_and_models_the_name(published: Any, tiny_llama: Path) -> None:
    assert "no models in" in printed("models")
    path = Path(printed("pull", NAME).strip())
    assert path.read_bytes() == tiny_llama.read_bytes()
    about = json.loads(printed("pull", NAME, "--json"))
    assert about == {
        "name": NAME, "path": str(path), "kind": "GGUF", "nbytes": tiny_llama.stat().st_size, "fetched_nbytes": 0,
        "commit": "c" * 40,
    }  # fmt: skip
    (model,) = json.loads(printed("models", "--json"))["models"]
    assert model["name"] == f"{NAME}:F32"
    assert model["path"] == str(path)
    assert f"{NAME}:F32" in printed("models")


def test_a_model_is_fetched_before_the_command_runs(
    published: Any, edgekv: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """In a process of its own, as a user does: settings come from the environment."""
    result = edgekv("convert", NAME, "-o", tmp_path / "small.gguf", "--target", "0.5", "--text-tokens", "64")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "small.gguf").is_file()
    result = edgekv("inspect", "hf:owner/tiny-GUFF")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"did you mean {NAME}" in result.stderr


def test_every_place_of_a_model_takes_a_name(published: Any, tiny_llama: Path) -> None:
    assert json.loads(printed("inspect", f"{NAME}:tiny-f32.gguf", "--json"))["n_layers"] == 3
    assert "argmax" in printed(
        "verify", NAME, str(tiny_llama), "--backend-b", "reference", "--text-tokens", "4"
    )
    with pytest.raises(InputError, match="there is no 'Q4_0'"):
        printed("verify", str(tiny_llama), f"{NAME}:Q4_0")


def test_a_sweep_takes_a_name(published: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(f'model = "{NAME}:Q9"\ntext = "book.txt"\n')
    with pytest.raises(InputError, match="there is no 'Q9' in owner/tiny-GGUF; it has F32"):
        printed("sweep", str(tmp_path / "sweep.toml"))
