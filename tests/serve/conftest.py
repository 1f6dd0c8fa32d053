"""`edgekv serve` in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

EDGEKV = str(Path(sys.executable).parent / "edgekv")
QUICK = ("-t", "1", "--cache-type", "f32", "--port", "0", "--json")


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it did not start: {process.communicate()}"
        self.about: dict[str, Any] = json.loads(line)
        self.url: str = self.about["address"]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def pid(self) -> int:
        return self._process.pid

    def engine(self) -> psutil.Process:
        """The process of its engine."""
        (child,) = psutil.Process(self.pid).children()
        return child

    def chat(self, text: str, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8} | fields
        return self.client.post("/v1/chat/completions", json=body)

    def figures(self) -> dict[str, float]:
        found: dict[str, float] = self.client.get("/status").json()["figures"]
        return found

    def end(self) -> int:
        """Press Ctrl-C; the exit code."""
        self.client.close()
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(30)


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Server]]:
    """Starts a server of a model with options; it ends with the block, if it has not ended in it."""
    return start


@contextmanager
def start(model: Path, *options: str, **given: Any) -> Iterator[Server]:
    """`given` are arguments of Popen; its `env` is added to this process's."""
    # Tests started in the background ignore SIGINT, and so would what they start.
    given.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen(
        [EDGEKV, "serve", str(model), *QUICK, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | given.pop("env", {}),
        **given,
    )
    try:
        server = Server(process)
        yield server
        server.client.close()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[Server]:
    """One for all tests of a module."""
    with start(tiny_llama, "--parallel", "2", "--queue", "1", "-c", "8192", "--max-body", "200000") as server:
        yield server
