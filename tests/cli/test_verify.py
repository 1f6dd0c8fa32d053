"""`edgekv verify`: two engines, two files, exit 1 past the tolerance."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.export.gguf.write import write_gguf
from edgekv.source import LazySource

Result = subprocess.CompletedProcess[str]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mla"])
def test_llama_cpp_agrees_with_the_reference(
    edgekv: Callable[..., Result], name: str, request: pytest.FixtureRequest
) -> None:
    result = edgekv("verify", request.getfixturevalue(name), "--text-tokens", 128, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["tokens"] == 128
    assert 0 < found["kl"] <= 1e-5 == found["tolerance"]


def test_past_the_tolerance_is_exit_code_1_and_the_figures(
    edgekv: Callable[..., Result], tiny_llama: Path, tiny_mla: Path
) -> None:
    models = (tiny_llama, tiny_mla, "--backend-b", "reference", "--text-tokens", 64)
    result = edgekv("verify", *models)
    assert result.returncode == 1
    assert "KL(A || B)" in result.stdout
    assert "past the tolerance 1e-05" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert edgekv("verify", *models, "--tolerance", 1000).returncode == 0


def test_text_and_cache_type(edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a quick brown fox " * 20)
    kl = [
        json.loads(
            edgekv(
                "verify",
                tiny_llama,
                "--text",
                text,
                "--text-tokens",
                100,
                "--cache-type",
                kind,
                "--tolerance",
                9,
                "--json",
            ).stdout
        )["kl"]
        for kind in ("f32", "q8_0/q4_0", "q4_0")
    ]
    assert kl[0] < 1e-5 < kl[1] < kl[2]


def test_bad_input(
    refused: Callable[..., str],
    tiny_llama: Path,
    tiny_mla: Path,
    make_llama: Callable[..., LazySource],
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.gguf"
    write_gguf(make_llama(filler=32), other, "f32", {}, False, lambda *_: None)
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert "vocabularies differ" in refused("verify", tiny_llama, other)
    assert "2 or more" in refused("verify", tiny_llama, "--text-tokens", 1)
    assert "no such file" in refused("verify", tiny_llama, tmp_path / "none.gguf")
    assert "none.txt" in refused("verify", tiny_llama, "--text", tmp_path / "none.txt")
    assert "holds 1 tokens" in refused("verify", tiny_llama, "--text", short)
    assert "cache type" in refused("verify", tiny_llama, "--cache-type", "q3")
    pair = ("--backend-a", "llama.cpp", "--cache-type", "q8_0/q4_0")
    assert "one row per token" in refused("verify", tiny_llama, tiny_mla, *pair)
