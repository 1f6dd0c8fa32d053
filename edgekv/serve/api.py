"""The endpoints under /v1: chats and completions, whole or streamed, and the model's name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edgekv.errors import EdgeKVError
from edgekv.serve.answers import ChatForm, CompletionForm, Form
from edgekv.serve.engine_process import EngineProcess, Event
from edgekv.serve.guard import (
    Endpoint,
    RefusedError,
    as_json,
    error_of,
    error_response,
    read_body,
    unless_gone,
)
from edgekv.serve.messages import ChatBody, CompletionBody

Answer = Callable[..., AsyncIterator[Event]]  # as EngineProcess.answer


class EventStream(StreamingResponse):
    """Events as lines; their source is closed when the client leaves, at once and not by the garbage collector."""

    def __init__(
        self, source: AsyncIterator[Event], lines: AsyncIterator[bytes], media_type: str = "text/event-stream"
    ) -> None:
        self._source = source
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, headers=headers, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


class API:
    """The endpoints over one engine, whose model is known to clients as `model`.

    Args:
        answer: gives the events of a job: the engine's own, or those of wherever a router sends it.
    """

    def __init__(
        self, engine: EngineProcess, answer: Answer, model: str, started: int, max_body: int
    ) -> None:
        self._engine, self._answer = engine, answer
        self._model, self._started, self._max_body = model, started, max_body

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._respond(request, ChatBody, ChatForm)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._respond(request, CompletionBody, CompletionForm)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        return as_json({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._require(request.path_params["name"])
        return as_json(self._about())

    async def packs(self, request: Request) -> Response:
        """GET /v1/packs: what requests can name in `packs`, and why other files of the folder cannot be used."""
        data = [{"object": "pack", **pack} for pack in self._engine.about["packs"]]
        return as_json({"object": "list", "data": data})

    async def _respond(
        self, request: Request, kind: type[ChatBody] | type[CompletionBody], form_of: type[Form]
    ) -> Response:
        body = await read_body(request, kind, self._max_body)
        self._require(body.model)
        form = form_of(self._model)
        events = self._answer(**body.job())
        if not body.stream:
            async with aclosing(events):  # type: ignore[type-var]
                return as_json(await unless_gone(request, _collect(events, form)))
        # Errors of the request itself come before the first event, and so still have a status of their own.
        form.add(await unless_gone(request, anext(events)))
        return EventStream(events, _chunks(events, form, body.include_usage))

    def _require(self, name: str | None) -> None:
        if name not in (None, self._model):
            raise RefusedError(
                404, f"there is no model {name!r} here; it is {self._model}", "model_not_found"
            )

    def _about(self) -> dict[str, Any]:
        n_ctx = self._engine.about["n_ctx"]
        return {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "edgekv",
            "context_length": n_ctx,
        }


def guarded(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors become responses."""

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (RefusedError, EdgeKVError, TimeoutError) as error:
            return error_response(error)

    return respond


async def _collect(events: AsyncIterator[Event], form: Form) -> dict[str, Any]:
    finish = ""
    async for event in events:
        form.add(event)
        finish = event.get("finish", finish)
    return form.whole(finish)


async def _chunks(events: AsyncIterator[Event], form: Form, include_usage: bool) -> AsyncIterator[bytes]:
    """The lines of a stream; comments, which clients skip, tell how much of a long prompt has been read."""
    try:
        if first := form.first_chunk():
            yield _line(first)
        async for event in events:
            if "n_read" in event:
                yield f": read {event['n_read']} of the prompt\n\n".encode()
            if chunk := form.add(event):
                yield _line(chunk)
    except (EdgeKVError, TimeoutError) as error:
        yield _line(error_of(error)[1])
        return
    if include_usage:
        yield _line(form.usage_chunk())
    yield b"data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
