"""Layers on workers: what is said where llama.cpp is built without RPC, and the same tokens where it is not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgekv.backends.llama_cpp.library import llama
from edgekv.backends.llama_cpp.rpc import chosen_workers
from edgekv.errors import InputError

EDGEKV = str(Path(sys.executable).parent / "edgekv")
HAS_RPC = bool(llama().llama_supports_rpc())


def chat(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [EDGEKV, "chat", str(model), "-p", "Count to ten: one,", "-n", "12", "--temp", "0", "--json"]
    return subprocess.run(
        [*command, "-c", "256", "-t", "1", "--no-template", "--kernel", "stock", *options],
        capture_output=True,
        text=True,
    )


@contextmanager
def worker() -> Iterator[str]:
    """A worker's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([EDGEKV, "worker", "--port", str(port), "-t", "1"])
    try:
        for _ in range(100):
            time.sleep(0.1)
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                continue
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(HAS_RPC, reason="this llama.cpp has the RPC engine")
def test_without_the_engine_it_is_said_how_to_build_it(tiny_llama: Path) -> None:
    for done in (
        subprocess.run([EDGEKV, "worker"], capture_output=True, text=True),
        chat(tiny_llama, "--rpc", "127.0.0.1:50052"),
    ):
        assert done.returncode == 3
        assert "CMAKE_ARGS=-DGGML_RPC=on" in done.stderr


@pytest.mark.skipif(not HAS_RPC, reason="this llama.cpp is built without the RPC engine")
def test_the_same_tokens_over_a_worker(smollm2: Path) -> None:
    alone = json.loads(chat(smollm2).stdout)
    with worker() as address:
        shared = chat(smollm2, "--rpc", address)
    assert shared.returncode == 0, shared.stderr
    assert json.loads(shared.stdout)["text"] == alone["text"]


def test_names_of_workers(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKV_RPC", "pi-2:50052, 192.168.1.3:50052,")
    assert chosen_workers() == ["pi-2:50052", "192.168.1.3:50052"]
    monkeypatch.setenv("EDGEKV_RPC", "pi-2")
    with pytest.raises(InputError, match="name each as host:port"):
        chosen_workers()
    monkeypatch.delenv("EDGEKV_RPC")
    assert chosen_workers() == []
    assert chat(tiny_llama, "--rpc", "pi-2").returncode == 2
