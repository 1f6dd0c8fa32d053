"""A server from its settings: binds the port, opens the model, answers until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgekv.errors import InputError
from edgekv.files import temporary_folder
from edgekv.serve.app import make_app
from edgekv.serve.engine_process import EngineProcess, Options
from edgekv.serve.settings import ServerSettings

HEADERS_S = 10.0  # seconds in which a new connection has to send its first headers
SPARE_CONNECTIONS = 64  # beside those that run or wait: pages, health, metrics
GRACE_S = 3  # seconds for answers to end once the server is told to


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose headers do not arrive in time, or come drop by drop."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)
        elif not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def run(
    options: Options,
    model: str,
    settings: ServerSettings,
    ready: Callable[[str, dict[str, Any]], None],
    tell: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        model: the name that clients know the model by.
        ready: called with the server's address and what is known of the engine, once it takes requests.
        tell: called with words on other servers, when one is lost or found.

    Raises:
        InputError: the address cannot be listened on, an option is impossible, the file is malformed or unsupported.
        BackendError: the engine is not installed, failed, or crashed while it loaded.
    """
    listener = _listen(settings.host, settings.port)
    engine = EngineProcess(options, settings.queue, settings.timeout_s)
    engine.open()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(address, engine.about)

    with contextlib.ExitStack() as ends:
        ends.callback(engine.close)
        app = _app(engine, model, settings, tell, ends)
        Server(_config(app, settings)).run(sockets=[listener])


def _app(
    engine: EngineProcess,
    model: str,
    settings: ServerSettings,
    tell: Callable[[str], None],
    ends: contextlib.ExitStack,
) -> ASGIApp:
    """The application; what it needs of others is undone by `ends`."""
    if not settings.shares:
        return make_app(engine, model, settings)
    from edgekv.serve.peers.endpoints import PeerAPI
    from edgekv.serve.peers.router import Router

    folder = ends.enter_context(temporary_folder("edgekv-peers-"))
    router = Router(engine, settings, folder, tell) if settings.peers else None
    return make_app(engine, model, settings, router, PeerAPI(engine, folder, settings.max_body))


def _config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.parallel + settings.queue + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port, or 0 for one that is free"
        ) from error
    return listener
