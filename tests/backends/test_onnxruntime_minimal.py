"""Chat with an ONNX folder where little is installed: no llama-cpp-python, no onnx, no torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.open import open_model
from edgekv.progress import ignore

INSTALLED = {"edgekv", "numpy", "onnxruntime", "gguf", "tokenizers", "click", "rich"}
# What two of them stand on: rich its markdown and highlighting; EdgeKV's chat templates jinja2, its manifests msgspec,
# its cache folder platformdirs.
BENEATH = {"markdown-it-py", "mdurl", "pygments", "jinja2", "markupsafe", "msgspec", "platformdirs"}
HOOK = """\
import sys

REFUSED = {refused!r}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {{name!r}} in a minimal installation", name=name)


sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def minimal(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that find only these packages, the engine's own process too."""
    providers = importlib.metadata.packages_distributions()
    kept = INSTALLED | BENEATH
    refused = {name for name, owners in providers.items() if not kept & {owner.lower() for owner in owners}}
    refused = {name for name in refused if not name.startswith("_")}
    assert {"llama_cpp", "onnx", "psutil", "safetensors", "torch"} <= refused
    return without(refused, tmp_path / "hook")


def without(packages: set[str], hook: Path) -> dict[str, str]:
    """The environment of processes in which importing these packages fails."""
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK.format(refused=sorted(packages)))
    path = os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_minimal_installation_chats(tiny_mla: Path, tmp_path: Path, minimal: dict[str, str]) -> None:
    folder = tmp_path / "tiny-onnx"
    write_onnx(open_model(tiny_mla), folder, OnnxOptions("int4", "int8"), False, ignore)

    def chat(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-P", "-m", "edgekv", "chat", model),
            *("-p", "hello", "-n", "5"),
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, env=minimal, timeout=120)

    result = chat(folder, "-t", "1", "-c", "64", "--json", "--stats")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["backend"], answer["n_generated"]) == ("onnx", 5)
    assert answer["cache_nbytes"] == 64 * 3 * (64 + 4)
    refused = chat(tiny_mla, "-t", "1")
    assert refused.returncode == 3, "the hook hides llama-cpp-python"
    assert "llama" in refused.stderr


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir"])
def test_only_the_export_to_onnx_needs_its_extra(missing: str, tiny_llama: Path, tmp_path: Path) -> None:
    environment = without({missing}, tmp_path / "hook")

    def export(kind: str, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "edgekv", "export", kind, str(tiny_llama), "-o", str(out)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    refused = export("onnx", tmp_path / "out")
    assert refused.returncode != 0
    assert "pip install 'edgekv[onnx]'" in refused.stderr
    assert not (tmp_path / "out").exists()
    written = export("gguf", tmp_path / "out.gguf")
    assert written.returncode == 0, written.stderr
