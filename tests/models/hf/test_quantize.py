"""Hugging Face folders quantized on the way in: the bytes of an export quantized afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.cli.main import cli
from edgekv.errors import ModelFileError
from edgekv.export.gguf.quantize import quantize_gguf
from edgekv.export.gguf.stream import staged_gguf
from edgekv.export.gguf.write import write_gguf
from edgekv.files import STALE_AFTER_S
from edgekv.models.hf.source import HFSource
from edgekv.source import LazySource

from .conftest import Zoo


def nothing(*_: object) -> None:
    pass


def edgekv(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "deepseek3", "phi-longrope"])
def test_bytes_are_those_of_export_and_quantize(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """llama.cpp reads tensors while they are written; what it makes of them must not depend on that."""
    whole = tmp_path / "whole.gguf"
    write_gguf(HFSource(zoo.folder(name)), whole, "f32", {}, False, nothing)
    quantize_gguf(whole, tmp_path / "a.gguf", "q5_0", {}, Quantizer(whole, 1), False, nothing)
    edgekv("quantize", zoo.folder(name), "-o", tmp_path / "b.gguf", "--weights", "q5_0", "--no-importance")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    edgekv("export", "gguf", zoo.folder(name), "-o", tmp_path / "c.gguf", "--weights", "q4_k_m")
    quantize_gguf(whole, tmp_path / "d.gguf", "q4_k_m", {}, Quantizer(whole, 1), False, nothing)
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{x}.gguf" for x in "abcd"), "whole.gguf"]


def test_importance_is_measured_on_a_folder(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    options = ("--weights", "iq4_nl", "--text-tokens", 512, "-t", 1)
    found = json.loads(edgekv("quantize", zoo.folder("smollm2"), "-o", out, *options, "--json"))
    assert found["importance"] is True
    assert found["source_was_quantized"] is False
    assert found["bytes"]["after"] == out.stat().st_size < found["bytes"]["before"] / 2
    errors = {tensor["name"]: tensor["error"] for tensor in found["tensors"]}
    assert 0.03 < errors["blk.0.ffn_up.weight"]["weighted"] < 0.15
    assert list(tmp_path.iterdir()) == [out]


def test_a_weight_that_cannot_be_read_ends_it(zoo: Zoo, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo.folder("llama2"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"up_proj.weight holds NaN"):
        edgekv("export", "gguf", folder, "-o", tmp_path / "out.gguf", "--weights", "q4_k_m")
    assert list(tmp_path.iterdir()) == [folder]


def test_everything_is_there_after_wait_all(zoo: Zoo, tmp_path: Path) -> None:
    source = HFSource(zoo.folder("minicpm3"))
    write_gguf(source, tmp_path / "whole.gguf", "f32", {}, False, nothing)
    with staged_gguf(source, tmp_path / "out.gguf") as staged:
        staged.wait_all(nothing)
        assert staged.path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_room_is_given_back(tmp_path: Path, make_llama: Callable[..., LazySource]) -> None:
    """A tensor that was read leaves only the rows that are compared; errors are those of the whole file."""
    source, whole = make_llama(filler=2**15), tmp_path / "whole.gguf"  # an embedding of 2 million values
    write_gguf(source, whole, "f32", {}, False, nothing)
    wanted = quantize_gguf(whole, tmp_path / "a.gguf", "q8_0", {}, Quantizer(whole, 1), False, nothing)
    with staged_gguf(source, tmp_path / "b.gguf") as staged:
        jobs = tmp_path / "b.gguf", "q8_0", {}, Quantizer(staged.path, 1), False, nothing, staged
        assert quantize_gguf(staged.path, *jobs) == wanted
        allocated = staged.path.stat().st_blocks * 512
    assert sys.platform != "linux" or allocated < whole.stat().st_size / 2
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_killed_and_started_again(zoo: Zoo, tmp_path: Path) -> None:
    """SIGKILL leaves hidden files under no model's name; the next run removes them."""
    out = tmp_path / "out.gguf"
    command = [str(Path(sys.executable).parent / "edgekv"), "quantize", str(zoo.folder("gemma3")), "-o"]
    command += [str(out), "--weights", "q4_k_m", "--text-tokens", "65536", "-t", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial := list(tmp_path.glob(".out.gguf.*.partial"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for child in children:
        child.kill()
    assert not out.exists()
    assert partial[0].exists()
    os.utime(partial[0], (time.time() - 2 * STALE_AFTER_S,) * 2)
    edgekv("export", "gguf", zoo.folder("gemma3"), "-o", out, "--weights", "q8_0")
    assert list(tmp_path.iterdir()) == [out]
