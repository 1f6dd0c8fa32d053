"""A server whose clock is set back again and again and whose disk is full, and bytes that are hardly HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Python imports it at its start: in the server, and in its engine.
BACKWARDS = """
import time
_now = time.time
_looks = 0
def backwards():
    global _looks
    _looks += 1
    return _now() - 3600.0 * _looks
time.time = backwards
"""
FILE_NBYTES = 4096  # what a file may hold: the write that goes beyond fails, as on a full disk


@pytest.fixture(scope="module")
def server(
    tiny_mla: Path, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fault")
    (folder / "sitecustomize.py").write_text(BACKWARDS)
    python_path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    options = ("-c", "512", "--parallel", "1", "--timeout", "20", "--sessions", str(folder / "kept"))
    with serving(
        tiny_mla,
        *options,
        env={"PYTHONPATH": python_path},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_NBYTES, FILE_NBYTES)),
    ) as server:
        server.kept = folder / "kept"
        yield server


def test_a_clock_that_goes_back_changes_nothing(server: Any) -> None:
    created = [server.chat("when?").json() for _ in range(3)]
    assert created[0]["created"] > created[1]["created"] > created[2]["created"]
    assert len({each["choices"][0]["message"]["content"] for each in created}) == 1
    body = {"prompt": "x", "stream": True, "max_tokens": 40}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_a_disk_without_room_changes_nothing(server: Any) -> None:
    prompts = [letter * 300 for letter in "abc"]  # each drives the one before it out
    answers = [server.chat(prompt).json() for prompt in prompts * 2]
    for first, second in zip(answers[:3], answers[3:], strict=True):
        assert first["choices"] == second["choices"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert server.figures()["disk_errors_total"] == 1
    assert server.figures()["disk_bytes"] == 0
    assert list(server.kept.iterdir()) == []
    assert server.figures()["engine_deaths_total"] == 0


def test_bytes_that_are_hardly_http(server: Any) -> None:
    rng, statuses = random.Random(0), Counter[bytes]()
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json"]
    whole = b"\r\n".join([*lines, b"Content-Length: 31"]) + b'\r\n\r\n{"prompt": "a", "max_tokens": 1}'
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randrange(6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with socket.create_connection((host, int(port)), timeout=20) as link, contextlib.suppress(OSError):
            link.sendall(data[: rng.randrange(len(data) // 2, len(data)) + 1])
            link.shutdown(socket.SHUT_WR)
            statuses[link.recv(12)[9:10]] += 1
    assert statuses[b"4"] > 10
    assert statuses[b"5"] == 0
    assert server.chat("still here").status_code == 200
