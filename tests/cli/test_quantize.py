"""`edgekv quantize` as a user meets it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edgekv.models.gguf.header import read_header

Result = subprocess.CompletedProcess[str]
PROSE = "The harbour lay quiet when the first boat came in, and the hold was full of mackerel.\n" * 60


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def test_text_calibration_and_the_table(
    edgekv: Callable[..., Result], smollm2: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    result = edgekv(
        "quantize",
        smollm2,
        "-o",
        out,
        "--weights",
        "q4_k_m",
        "--text",
        prose,
        "--text-tokens",
        512,
        "-t",
        1,
    )
    assert result.returncode == 0, result.stderr
    assert "rows of 576 values, which do not divide" in result.stdout
    assert "start from f32, f16 or bf16" in result.stdout
    assert "Q5_0 *" in result.stdout
    types = {tensor.name: tensor.ggml_type for tensor in read_header(out).tensors}
    assert types["blk.0.ffn_down.weight"] in ("Q4_K", "Q6_K")
    assert types["blk.0.attn_q.weight"] == "Q5_0"


def test_its_own_text_and_json(edgekv: Callable[..., Result], tiny_mla: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    command = ("quantize", tiny_mla, "-o", out, "--weights", "iq4_nl", "--text-tokens", 1024, "-t", 1)
    result = edgekv(*command, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["importance"] is True
    assert report["source_was_quantized"] is False
    assert report["bytes"]["after"] == out.stat().st_size < report["bytes"]["before"] / 2
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert "blk.0.attn_kv_a_mqa.weight" not in tensors  # folded for its norm: stays as it is
    query = tensors["blk.0.attn_q.weight"]
    assert (query["before"], query["after"]) == ("F32", "IQ4_NL")
    assert 0.03 < query["error"]["rms"] < 0.15
    assert 0.03 < query["error"]["weighted"] < 0.15
    again = edgekv(*command, "--force", "--no-importance", "--each")
    assert again.returncode == 0, again.stderr
    assert "blk.2.ffn_down.weight" in again.stdout


def test_bad_input(refused: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    command = ("-o", out, "--weights", "q4_0")
    assert "there is no such file" in refused("quantize", tmp_path / "no.gguf", *command)
    assert "there is no config.json" in refused("quantize", tmp_path, *command)
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 20)
    assert "is not a GGUF file" in refused("quantize", tmp_path / "junk.gguf", *command)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_llama.read_bytes()[:-5000])
    assert "download it again" in refused("quantize", cut, *command)
    model = ("quantize", tiny_llama, "--weights")
    assert "exists; pass --force" in refused(*model, "q4_0", "-o", cut)
    assert "is the model itself" in refused(*model, "q4_0", "-o", tiny_llama, "--force")
    assert "does not exist" in refused(*model, "q4_0", "-o", tmp_path / "no" / "out.gguf")
    assert "--text-tokens takes a positive" in refused(*model, "q4_0", "-o", out, "--text-tokens", 0)
    missing = ("--text", tmp_path / "no.txt")
    assert "cannot read" in refused(*model, "q4_0", "-o", out, *missing)
    (tmp_path / "short.txt").write_text("Too short.")
    assert "shorter than one window" in refused(*model, "q4_0", "-o", out, "--text", tmp_path / "short.txt")
    assert "useless without" in refused(*model, "iq2_xs", "-o", out, "--no-importance")
    assert not out.exists()


@contextlib.contextmanager
def no_file_past(nbytes: int) -> Iterator[None]:
    """Files larger than so many bytes cannot be written: Python ignores SIGXFSZ, so writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told(refused: Callable[..., str], smollm2: Path, tmp_path: Path) -> None:
    with no_file_past(2**20):
        message = refused("quantize", smollm2, "-o", tmp_path / "out.gguf", "--weights", "q8_0", "-t", 1)
    assert "free some space" in message
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    edgekv = str(Path(sys.executable).parent / "edgekv")
    command = ["quantize", str(smollm2), "-o", str(tmp_path / "out.gguf"), "--weights", "q5_k_m", "-t", "1"]
    process = subprocess.Popen(
        [edgekv, *command, "--no-importance"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 2**20 for path in tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
