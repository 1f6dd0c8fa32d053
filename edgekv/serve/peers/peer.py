"""One other server: what is known of it, renewed while both run, and what it is asked for."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from edgekv.errors import EdgeKVError, from_wire
from edgekv.route.cost import Link, Prefill, Site
from edgekv.route.fit import Measurements
from edgekv.serve.engine_process import Event
from edgekv.serve.peers import wire
from edgekv.serve.peers.wire import Catalogue, PeerEvent, PeerState

RENEW_S = 2.0  # between two looks at a peer
LINK_S = 60.0  # between two measurements of the link's bytes/s
NOISE_NBYTES, NOISE_S = 2**16, 0.1  # of the first one; larger ones follow until one takes so long
CONNECT_S, SILENT_S = 1.0, 2.0  # a peer that takes longer to connect, or between two signs of life, is gone
COPYING_S = 5.0  # likewise, where it has to copy rows out of its engine first
STALL_S = 10.0  # between two tokens of an answer
PAUSE_S = 30.0  # in which a peer that failed is asked for nothing
N_EXTRAS = 16  # answers of which the median counts
FIRST_LINK = (0.001, 1e-7)  # seconds of a round trip and per byte, before they were measured


Tell = Callable[[str], None]


class PeerError(EdgeKVError):
    """A peer did not do what it was asked for; the request goes another way."""


class Peer:
    """A server at an address.

    Attributes:
        why_not: why it is not asked for anything now; "" where it is.
        n_failed: how often it failed.

    Args:
        fingerprint, n_ctx: what it has to share with this server, and the shortest context that can stand in for it.
        tell: is told whenever why_not has changed.
    """

    def __init__(self, url: str, key: str, fingerprint: str, n_ctx: int, tell: Tell) -> None:
        self._tell = tell
        self.url = url.rstrip("/")
        self._fingerprint, self._n_ctx = fingerprint, n_ctx
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False)
        self._state: PeerState | None = None
        self._generation = ""
        self.catalogue = Catalogue()
        self._link = Measurements(FIRST_LINK)
        self._measured_at = -LINK_S
        self._busy_until = self._seen_at = self._paused_until = 0.0
        self._n_transfers = 0
        self._extras: deque[float] = deque(maxlen=N_EXTRAS)
        self.why_not = "it was not asked yet"
        self.n_failed = 0

    @property
    def usable(self) -> bool:
        """Whether it may be asked for answers and rows."""
        now = time.monotonic()
        known = self._state is not None and now - self._seen_at < 3 * RENEW_S
        return known and not self.why_not and now >= self._paused_until

    @property
    def packs(self) -> tuple[str, ...]:
        """Names of packs that its requests can name."""
        return self._state.packs if self._state else ()

    @property
    def link(self) -> Link:
        """The connection to it, as it was measured."""
        round_trip_s, byte_s = self._link.coefficients
        return Link(round_trip_s, 1 / max(byte_s, 1e-12))

    @property
    def site(self) -> Site:
        """Its engine, with what it was sent since it told how busy it is."""
        state, now = self._state, time.monotonic()
        assert state is not None
        wait_s = max(state.wait_s, self._busy_until - now)
        prefill, short = Prefill(*state.prefill), Prefill(*state.short)
        return Site(prefill, state.decode_s, wait_s, state.save_s, state.load_s, short)

    @property
    def extra_s(self) -> float:
        """What its answers took lately beyond what was predicted without this: HTTP, processes, a busy machine."""
        return max(0.0, statistics.median(self._extras)) if self._extras else 0.0

    def took(self, more_s: float) -> None:
        """Note how much longer than predicted its first token took."""
        self._extras.append(self.extra_s + more_s)

    def promise(self, seconds: float) -> None:
        """Note that it was sent what will take it some time."""
        self._busy_until = max(self._busy_until, time.monotonic()) + seconds

    def failed(self) -> None:
        """Ask it for nothing for a while."""
        self.n_failed += 1
        self._paused_until = time.monotonic() + PAUSE_S
        self._busy_until = 0.0

    async def live(self) -> None:
        """Keep what is known of it new, until this is cancelled."""
        async with self._client:
            while True:
                if self._n_transfers:  # its link is full, and what it says would come late
                    self._seen_at = time.monotonic()
                else:
                    await self._look()
                await asyncio.sleep(RENEW_S)

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(LINK_S):
                await self._renew()
            self._note("")
        except PeerError as error:
            if not self._n_transfers:
                self._note(str(error))
        except TimeoutError:
            self._note("it is too slow")

    def _note(self, why_not: str) -> None:
        if why_not != self.why_not:
            self._tell(f"peer {self.url}: {why_not or 'it is there'}")
        self.why_not = why_not

    def about(self) -> dict[str, Any]:
        """What the server tells of it."""
        link = self.link
        return {
            "url": self.url,
            "usable": self.usable,
            "why_not": self.why_not,
            "blocks": len(self.catalogue),
            "round_trip_s": link.round_trip_s,
            "bytes_per_s": link.bytes_per_s,
            "failed": self.n_failed,
        }

    async def _renew(self) -> None:
        began = time.monotonic()
        state = _decoded(await self._get(wire.STATE, 2**16), PeerState)
        now = time.monotonic()
        if state.version != wire.VERSION:
            raise PeerError("it is of another version of EdgeKV")
        if state.fingerprint != self._fingerprint:
            raise PeerError("it serves another model, or keeps its cache otherwise")
        if state.n_ctx < self._n_ctx:
            raise PeerError(f"its context holds {state.n_ctx} tokens, fewer than {self._n_ctx}")
        self._link.add((1.0, 0.0), now - began)
        self._state, self._seen_at = state, now
        if state.generation != self._generation:
            self.catalogue = Catalogue(await self._get(wire.CATALOGUE, wire.MAX_CATALOGUE_NBYTES))
            self._generation = state.generation
        if now - self._measured_at >= LINK_S:
            await self._measure()
            self._measured_at = time.monotonic()

    async def _measure(self) -> None:
        """Measure the link's bytes/s: larger and larger answers, until one takes long enough to tell."""
        nbytes, seconds = NOISE_NBYTES, 0.0
        while seconds < NOISE_S and nbytes <= wire.MAX_NOISE_NBYTES:
            began = time.monotonic()
            await self._get(f"{wire.NOISE}?n={nbytes}", nbytes)
            seconds = time.monotonic() - began
            self._link.add((1.0, nbytes), seconds)
            nbytes *= 4

    async def _get(self, path: str, most: int) -> bytes:
        """The body of an answer of at most so many bytes."""
        async with self._asked("GET", path, None, RENEW_S) as response:
            data = bytearray()
            async for chunk in _chunks(response):
                data += chunk
                if len(data) > most:
                    raise PeerError("it answers more than it was asked for")
            return bytes(data)

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: Any, seconds: float, silent_s: float = SILENT_S
    ) -> AsyncIterator[httpx.Response]:
        """A response whose headers came within some seconds; its body is still to be read."""
        content = {} if body is None else {"content": msgspec.json.encode(body)}
        headers = {} if body is None else {"Content-Type": "application/json"}
        times = httpx.Timeout(silent_s, connect=CONNECT_S)
        request = self._client.build_request(method, path, headers=headers, timeout=times, **content)  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            raise PeerError("it does not answer in time") from None
        except httpx.HTTPError as error:
            raise PeerError(f"it cannot be reached: {_words(error)}") from error
        try:
            if response.status_code == 401:
                raise PeerError("it has another key; give all servers the same --peer-key")
            if response.status_code != 200:
                raise PeerError(f"it answers with status {response.status_code}")
            yield response
        finally:
            await response.aclose()

    async def fetch(self, block: bytes, count: int, path: Path, nbytes: int, seconds: float) -> None:
        """Write the rows of tokens up to a block to a file, of about `nbytes`; it is not checked yet.

        Raises:
            PeerError: it does not give them, not in these seconds, or gives something else.
        """
        wanted = wire.RowsWanted(block.hex(), count)
        began, received = time.monotonic(), 0
        self._n_transfers += 1
        try:
            async with asyncio.timeout(seconds):
                async with self._asked("POST", wire.ROWS, wanted, seconds, COPYING_S) as response:
                    with path.open("wb") as file:
                        async for chunk in _chunks(response):
                            received += len(chunk)
                            if received > nbytes:
                                raise PeerError("it gives more rows than it was asked for")
                            file.write(chunk)
        except TimeoutError:
            raise PeerError("its rows do not come in time") from None
        finally:
            self._n_transfers -= 1
        computing = self.site.save_s * received
        self._link.add((1.0, received), time.monotonic() - began - computing)

    async def answer(self, wanted: wire.JobWanted, deadline: float) -> AsyncGenerator[Event, None]:
        """The events of its answer, as edgekv.serve.engine_process.EngineProcess.answer gives them.

        Args:
            deadline: of the first token, on time.monotonic.

        Raises:
            PeerError: it is too slow, breaks off, or answers with an error.
        """
        seconds = max(0.0, deadline - time.monotonic())
        async with (
            self._asked("POST", wire.ANSWER, wanted, seconds) as response,
            aclosing(_lines(response)) as lines,
        ):
            async for line in lines:
                if time.monotonic() > deadline:
                    raise PeerError("its answer does not come in time")
                if not line:
                    continue
                event = _decoded(line, PeerEvent)
                if event.error is not None:
                    raise PeerError(str(from_wire(*event.error)))
                if event.token is not None:
                    deadline = time.monotonic() + STALL_S
                yield event.plain()
                if event.finish is not None:
                    return
        raise PeerError("its answer broke off")


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    """The pieces of a body as they come."""
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx.HTTPError as error:
        raise PeerError(f"the connection broke: {_words(error)}") from error


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The lines of a body; whenever something comes, and be it part of one, at least an empty line."""
    rest = b""
    async for chunk in _chunks(response):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > wire.MAX_LINE_NBYTES:
            raise PeerError("it answers with a line that does not end")
        for line in lines or [b""]:
            yield line


def _decoded(data: bytes, kind: type[wire.T]) -> wire.T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise PeerError(f"its answer cannot be read: {error}") from error


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
