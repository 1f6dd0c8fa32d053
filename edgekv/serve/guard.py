"""What comes before an answer: who may ask, what a request may weigh, and errors as OpenAI's API words them."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edgekv.errors import InputError
from edgekv.serve.engine_process import BusyError, EngineDiedError
from edgekv.serve.settings import ServerSettings
from edgekv.tokenizer.language import without_surrogates

BODY_S = 30.0  # seconds in which a body has to arrive
RETRY_S = 5  # what a client that is refused for now should wait
T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
OPEN_PATHS = ("/", "/page.css", "/page.js", "/health")  # tell nothing that needs a key
PEER_PATHS = "/peer/"  # what servers ask of each other
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class RefusedError(Exception):
    """A request that gets this status; `code` is the short name of what is wrong."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an error and its object in OpenAI's form."""
    status, code = 500, "engine_failed"
    if isinstance(error, RefusedError):
        status, code = error.status, error.code
    elif isinstance(error, BusyError):
        status, code = 429, "queue_full"
    elif isinstance(error, EngineDiedError):
        status, code = 503, "engine_died"
    elif isinstance(error, TimeoutError):
        status, code = 504, "timeout"
    elif isinstance(error, InputError):
        status, code = 400, "invalid_value"
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = (
        str(error)
        or "the request took too long; ask for fewer tokens, or start the server with more --timeout"
    )
    message = without_surrogates(message)
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(error: Exception) -> Response:
    """An error as a response."""
    status, body = error_of(error)
    headers = {429: {"Retry-After": str(RETRY_S)}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return as_json(
        body, status, {**(headers or {}), **({"Connection": "close"} if status in (408, 413) else {})}
    )


async def read_body(request: Request, kind: type[T], max_nbytes: int) -> T:
    """A request's body as a struct.

    Raises:
        RefusedError: it is too large, too slow, no JSON, or not of this kind.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site could send any other type without asking first.
        raise RefusedError(415, "the body must be JSON; send Content-Type: application/json", "content_type")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_nbytes:
                    raise RefusedError(
                        413, f"the body is larger than {max_nbytes} bytes; shorten it", "too_large"
                    )
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {BODY_S:g} s", "too_slow") from None
    except ClientDisconnect:
        raise RefusedError(499, "the client left", "client_left") from None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RefusedError(400, f"the body cannot be used: {error}", "invalid_body") from error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of work that is given up when the client leaves.

    Raises:
        RefusedError: the client left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError(499, "the client left", "client_left")
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """Checks of every request, in front of an ASGI application: its Host and its key; other servers have their own.

    Without a key only programs on this machine may ask. Host is checked then, since a name of another site that leads
    here would let that site's pages read answers (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._key, self._peer_key = app, settings.api_key, settings.peer_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> RefusedError | None:
        key = self._peer_key if request.url.path.startswith(PEER_PATHS) else self._key
        if not key:
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in LOCAL_NAMES:
                return RefusedError(403, "this server answers to localhost and 127.0.0.1 alone", "host")
            return None
        if request.url.path in OPEN_PATHS:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
        if kind.lower() == "bearer" and same:
            return None
        return RefusedError(
            401, "the key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key"
        )
