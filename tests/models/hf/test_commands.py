"""inspect, convert and verify take a Hugging Face folder as they take a GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.errors import UnsupportedError
from edgekv.models.hf.source import HFSource
from edgekv.models.open import open_model
from edgekv.reference.model import ReferenceModel

from .conftest import TOKENS, Zoo


def run(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect(zoo: Zoo) -> None:
    found = json.loads(run("inspect", zoo.folder("smollm2"), "--json"))
    assert (found["architecture"], found["n_layers"], found["tied_embeddings"]) == ("llama", 3, True)
    assert found["quantization"] == {"F32": found["parameters"]}
    assert found["could_become"]


def test_inspect_says_why_not(zoo: Zoo) -> None:
    found = json.loads(run("inspect", zoo.folder("qwen3"), "--json"))
    assert found["peculiarities"] == ["QK-norm"]
    assert not found["could_become"]
    assert "cannot be absorbed" in found["obstacle"]
    assert "QK-norm" in run("inspect", zoo.folder("qwen3"))


def test_verify_in_the_reference(zoo: Zoo) -> None:
    folder = zoo.folder("llama2")
    found = json.loads(
        run("verify", folder, folder, "--backend-b", "reference", "--text-tokens", "16", "--json")
    )
    assert found["kl"] == 0


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral", "smollm3", "llama3", "deepseek3", "qwen2"])
def test_convert_refuses_with_a_reason(name: str, zoo: Zoo, tmp_path: Path) -> None:
    args = ["convert", str(zoo.folder(name)), "-o", str(tmp_path / "x.gguf"), "--target", "0.5"]
    with pytest.raises(UnsupportedError, match=r"cannot become MLA in llama.cpp: .*; |already has MLA"):
        CliRunner().invoke(cli, args, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_heal_refuses_with_a_reason(zoo: Zoo, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 400)
    args = [
        "heal",
        str(zoo.folder("qwen3")),
        "-o",
        str(tmp_path / "x.safetensors"),
        "--target",
        "0.5",
        "--steps",
        "1",
    ]
    with pytest.raises(UnsupportedError, match="QK-norm and cannot become MLA"):
        CliRunner().invoke(
            cli, [*args, "--text", str(text), "--eval-text", str(text)], catch_exceptions=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("mistral", "set max_position_embeddings to the window"),
        ("gemma2", "attention softcapping and cannot"),
        ("phi", "set max_position_embeddings to the window"),
        ("qwen2-window", "biases on queries"),
    ],
)
def test_a_window_is_blamed_where_it_alone_stands_in_the_way(name: str, phrase: str, zoo: Zoo) -> None:
    assert phrase in json.loads(run("inspect", zoo.folder(name), "--json"))["obstacle"]


def test_a_window_that_was_taken_away(zoo: Zoo, tmp_path: Path, edit_config: Callable[..., None]) -> None:
    """What the refusal of Mistral advises leaves nothing in the way, and computes the same within the window."""
    folder = Path(shutil.copytree(zoo.folder("mistral"), tmp_path / "model"))
    edit_config(folder, max_position_embeddings=24, sliding_window=None)
    assert json.loads(run("inspect", folder, "--json"))["could_become"]
    model = ReferenceModel(HFSource(folder))
    logits = model.logits(model.hidden(TOKENS[:24], model.new_cache(24)))
    assert np.abs(logits - zoo.logits("mistral")[:24]).max() <= 1e-4


def test_convert(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "half.gguf"
    run("convert", zoo.folder("smollm2"), "-o", out, "--target", "0.5", "--text-tokens", "64", "--json")
    source = open_model(out)
    assert source.spec.arch == "deepseek2"
    assert source.quantization("blk.0.ffn_up.weight") == "F32"  # kept as it was stored
    assert source.metadata["tokenizer.chat_template"] == "{{ messages }}"


def test_convert_folds_biases_where_asked(zoo: Zoo, tmp_path: Path) -> None:
    """Qwen2 pairs RoPE dims by halves and has biases; the text is the model's own, so sampling has to know them."""
    out = tmp_path / "half.gguf"
    args = (
        "--kv-lora-rank",
        "32",
        "--rope-dim",
        "16",
        "--text-tokens",
        "1024",
        "--fold-biases",
        "--weights",
        "f32",
        "--verify",
    )
    assert "bias error" in run("convert", zoo.folder("qwen2"), "-o", out, *args)
    source = open_model(out)
    assert source.spec.arch == "deepseek2"
    errors = source.metadata["edgekv.bias_error"]
    assert isinstance(errors, list)
    assert len(errors) == source.spec.n_layers
    assert all(0 < float(error) <= 1 for error in errors)
