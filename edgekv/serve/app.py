"""The server's ASGI application: the API, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgekv.serve.api import API, guarded
from edgekv.serve.engine_process import EngineProcess
from edgekv.serve.figures import prometheus, status
from edgekv.serve.guard import Endpoint, Guard, RefusedError, as_json, error_response
from edgekv.serve.settings import ServerSettings

if TYPE_CHECKING:  # they need httpx, which a server without peers does without
    from edgekv.serve.peers.endpoints import PeerAPI
    from edgekv.serve.peers.router import Router

# The page runs its own script alone, and talks to this server alone.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def make_app(
    engine: EngineProcess,
    model: str,
    settings: ServerSettings,
    router: Router | None = None,
    peer_api: PeerAPI | None = None,
) -> ASGIApp:
    """The application over an open engine, which lives and ends with it.

    Args:
        router: sends requests to other servers; without one all are answered by the engine.
        peer_api: what other servers may ask for.
    """
    api = API(engine, router.answer if router else engine.answer, model, int(time.time()), settings.max_body)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        life = asyncio.create_task(engine.live())
        routing = asyncio.create_task(router.live()) if router else None
        yield
        if routing is not None:
            routing.cancel()
        await engine.end()
        await life

    async def health(request: Request) -> Response:
        if engine.ready:
            return as_json({"status": "ok"})
        return as_json({"status": "restarting", "error": engine.failure}, 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(prometheus(engine, router), media_type="text/plain; version=0.0.4")

    async def tell_status(request: Request) -> Response:
        return as_json(status(engine, model, router), headers={"Cache-Control": "no-store"})

    routes = [
        Route("/v1/chat/completions", guarded(api.chat), methods=["POST"]),
        Route("/v1/completions", guarded(api.completion), methods=["POST"]),
        Route("/v1/models", guarded(api.models)),
        Route("/v1/packs", guarded(api.packs)),
        Route("/v1/models/{name:path}", guarded(api.model)),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/status", tell_status),
        *(Route(path, _file(*content)) for path, content in PAGE.items()),
        *(peer_api.routes() if peer_api else []),
    ]
    handlers = {HTTPException: _http_error}
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), settings)  # type: ignore[arg-type]


def _file(name: str, media_type: str) -> Endpoint:
    content = files("edgekv.serve").joinpath("page", name).read_bytes()

    async def respond(request: Request) -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=media_type)

    return respond


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such path, or no such method there."""
    return error_response(
        RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "path")
    )
