"""What this server does for others of its model, under /peer. Nothing here asks a peer: no request goes in circles."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgekv.documents import decode
from edgekv.errors import EdgeKVError, to_wire
from edgekv.serve.api import EventStream, guarded
from edgekv.serve.engine.rates import RatesNow
from edgekv.serve.engine_process import EngineProcess, Event
from edgekv.serve.guard import RefusedError, as_json, read_body
from edgekv.serve.peers import wire
from edgekv.serve.peers.wire import JobWanted, PeerState, RowsWanted

CHUNK_NBYTES = 2**18
BINARY = "application/octet-stream"


class PeerAPI:
    """The endpoints over one engine.

    Args:
        folder: for files with rows that are on their way.
    """

    def __init__(self, engine: EngineProcess, folder: Path, max_body: int) -> None:
        self._engine, self._folder, self._max_body = engine, folder, max_body
        self._names = itertools.count()
        self._noise = os.urandom(wire.MAX_NOISE_NBYTES // 64) * 64

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route(wire.STATE, guarded(self.state)),
            Route(wire.CATALOGUE, guarded(self.catalogue)),
            Route(wire.NOISE, guarded(self.noise)),
            Route(wire.ANSWER, guarded(self.answer), methods=["POST"]),
            Route(wire.ROWS, guarded(self.rows), methods=["POST"]),
        ]

    async def state(self, request: Request) -> Response:
        """GET state: the fingerprint, the speeds, and how long a new prompt would wait."""
        engine = self._engine
        if not (engine.ready and "rates" in engine.stats):
            raise RefusedError(503, "the engine is being started; ask again", "engine_died")
        rates = decode(RatesNow, engine.stats["rates"])
        about = engine.about
        state = PeerState(
            version=wire.VERSION,
            fingerprint=about["fingerprint"],
            n_ctx=about["n_ctx"],
            generation=engine.catalogue.get("generation", ""),
            packs=tuple(pack["id"] for pack in about["packs"] if "error" not in pack),
            prefill=rates.prefill,
            short=rates.short,
            decode_s=rates.decode_s,
            save_s=rates.save_s,
            load_s=rates.load_s,
            wait_s=engine.wait_s,
        )
        return as_json(state)

    async def catalogue(self, request: Request) -> Response:
        """GET catalogue: the marks of all blocks, one after the other."""
        return Response(base64.b64decode(self._engine.catalogue.get("marks", "")), media_type=BINARY)

    async def noise(self, request: Request) -> Response:
        """GET noise?n=BYTES: as many, which no compression makes fewer, to measure the link."""
        with contextlib.suppress(ValueError):
            if 0 < (count := int(request.query_params.get("n", "0"))) <= wire.MAX_NOISE_NBYTES:
                return Response(self._noise[:count], media_type=BINARY)
        raise RefusedError(400, f"n must be between 1 and {wire.MAX_NOISE_NBYTES}", "invalid_value")

    async def answer(self, request: Request) -> Response:
        """POST answer: events as lines of JSON, and an empty line wherever none came for a while."""
        job = await read_body(request, JobWanted, self._max_body)
        events = self._engine.answer(**msgspec.to_builtins(job))
        return EventStream(events, _lines(events), media_type="application/x-ndjson")

    async def rows(self, request: Request) -> Response:
        """POST rows: a file of rows."""
        wanted = await read_body(request, RowsWanted, self._max_body)
        path = self._folder / f"{next(self._names)}.offer"
        try:
            await self._engine.ask("offer", block=wanted.block, count=wanted.count, path=str(path))
            file = path.open("rb")
        finally:
            path.unlink(missing_ok=True)

        async def chunks() -> AsyncIterator[bytes]:
            with file:
                while chunk := file.read(CHUNK_NBYTES):
                    yield chunk

        return StreamingResponse(chunks(), media_type=BINARY)


async def _lines(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait({coming}, timeout=wire.BEAT_S)
            if not done:
                yield b"\n"
                continue
            if (event := coming.result()) is None:
                return
            coming = None
            yield _line({name: value for name, value in event.items() if name != "id"})
    except (EdgeKVError, TimeoutError) as error:
        yield _line({"error": to_wire(error)})
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event) + b"\n"
