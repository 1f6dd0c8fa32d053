"""Connections that send nothing, or their headers drop by drop."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from edgekv.serve import run
from edgekv.serve.run import PatientProtocol


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(run, "HEADERS_S", 0.4)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(hello, http=PatientProtocol, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("drops", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nA: b"])
@pytest.mark.parametrize("requests_before", [0, 1])
def test_they_are_closed(port: int, drops: bytes, requests_before: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for _ in range(requests_before):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            data = b""
            while not data.endswith(b"hi"):
                new = connection.recv(1000)
                assert new
                data += new
        if requests_before and not drops:
            return  # kept alive, for uvicorn's own time
        started = time.monotonic()
        for i in range(len(drops)):
            connection.sendall(drops[i : i + 1])
            time.sleep(0.01)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
        assert time.monotonic() - started < 3
