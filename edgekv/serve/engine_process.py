"""The engine's process as the server sees it: answers as streams of events, a queue, and a restart when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from edgekv.backends.isolated.child import Child
from edgekv.cache.policies.settings import Eviction
from edgekv.documents import encode
from edgekv.errors import BackendError, EdgeKVError, from_wire

SILENCE_S = 180.0  # without a word from an engine at work: it hangs
SAVING_S = 30.0  # that an engine may take to put on the disk what it keeps
RESTART_S, MAX_RESTART_S = 1.0, 60.0  # between two attempts to start it again

Event = dict[str, Any]  # a message of edgekv.serve.engine.scheduler


class BusyError(EdgeKVError):
    """The queue is full."""


class EngineDiedError(BackendError):
    """The engine's process died while it answered."""


@dataclass(frozen=True)
class Options:
    """Arguments of edgekv.backends.open.open_sequences, the folders of packs and of what is kept on disk, and whether
    rows are exchanged with other servers."""

    path: str
    kind: str | None
    n_parallel: int
    n_ctx: int | None
    cache_type: str | None
    n_threads: int | None
    eviction: Eviction | None = None
    packs: str | None = None
    sessions: str | None = None
    sessions_bytes: int = 2**30
    shares: bool = False


@dataclass
class Counts:
    """What has happened since the server started."""

    n_requests: int = 0
    n_busy: int = 0
    n_deaths: int = 0
    n_prompt: int = 0
    n_reused: int = 0
    n_generated: int = 0


@dataclass
class EngineProcess:
    """One engine; `open` it, then let `live` run beside the requests.

    Attributes:
        about: the model and its cache, as edgekv.serve.engine.child tells them.
        stats: the latest figures of the engine's scheduler.
        catalogue: what other servers may ask for, as edgekv.serve.engine.exchange tells it.
        failure: why there is no engine now; "" while there is one.
        n_waiting: requests in the queue.
        answer_s: how long answers took lately.
    """

    options: Options
    queue: int
    timeout_s: float
    about: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    catalogue: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    failure: str = ""
    n_waiting: int = 0
    answer_s: float = 0.0

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.options.n_parallel)
        self._ready = asyncio.Event()
        self._ids = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Event]] = {}
        self._began: dict[object, float] = {}  # when each answer did that runs
        self._writer = ThreadPoolExecutor(1)  # a full pipe holds up a thread, not the server
        self._closing = False
        self._heard_at = 0.0

    @property
    def pid(self) -> int:
        """The process id of the engine."""
        return self._child.pid

    @property
    def ready(self) -> bool:
        """Whether there is an engine that takes requests."""
        return self._ready.is_set()

    @property
    def wait_s(self) -> float:
        """Seconds until the engine would begin with a new prompt, about.

        Of answers that run it is known how long they have run, and how long others took: as long again is expected.
        """
        slots_s = 0.0
        if self._slots.locked():
            now = time.monotonic()
            left = [max(self.answer_s, now - began) for began in self._began.values()] or [self.answer_s]
            slots_s = (self.n_waiting + 1) * statistics.fmean(left) / self.options.n_parallel
        return slots_s + float(self.stats.get("unread_s", 0.0))

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        return len(self._began)

    def open(self) -> None:
        """Start the engine and wait until the model is loaded.

        Raises:
            InputError: an option is impossible, or the file is malformed or unsupported.
            BackendError: the engine is not installed, failed, or crashed while it loaded.
        """
        remedy = "take fewer --parallel, a smaller --ctx-size or --cache-type q8_0"
        child = Child("edgekv.serve.engine.child", out_of_memory=remedy)
        try:
            self.about = child.ask("open", **encode(self.options))
        except BaseException:
            child.close()
            raise
        self._child = child
        if self._closing:
            self.close()

    async def live(self) -> None:
        """Hear the engine, and start it again whenever it dies; ends after `close`."""
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                self.failure = ""
                self._heard_at = time.monotonic()
                self._ready.set()
                cause = await asyncio.to_thread(self._hear, asyncio.get_running_loop())
                self._ready.clear()
                if self._closing:
                    return
                self._died(cause)
                await self._restart()
        finally:
            watch.cancel()

    async def end(self) -> None:
        """End the engine, once it has put on the disk what it keeps, if it has one."""
        if self.options.sessions and self.ready:
            self._send({"do": "end"})
            self._closing = True
            await asyncio.wait({asyncio.create_task(asyncio.to_thread(self._child.wait))}, timeout=SAVING_S)
        self.close()

    def close(self) -> None:
        """End the engine at once."""
        self._closing = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._writer.shutdown(wait=False)

    async def answer(self, **wanted: Any) -> AsyncIterator[Event]:
        """The events of a new job, whose arguments are those of edgekv.serve.engine.scheduler.Scheduler.start.

        The first one is that of its begin, the last one has a "finish". Closing the stream earlier ends the job.

        Raises:
            BusyError: too many requests wait already.
            TimeoutError: it took more than timeout_s.
            EngineDiedError: the engine's process died.
            EdgeKVError: the request cannot be answered, or the engine failed.
        """
        deadline = time.monotonic() + self.timeout_s
        self.counts.n_requests += 1
        await self._take_slot(deadline)
        slot = object()
        began = self._began[slot] = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._started()
            id, stream = self._begin("start", wanted)
            finished = False
            try:
                while not finished:
                    event = await asyncio.wait_for(stream.get(), deadline - time.monotonic())
                    finished = "finish" in event or "error" in event
                    if "error" in event:
                        raise event["error"]
                    self._count(event)
                    yield event
            finally:
                del self._streams[id]
                if not finished:
                    self._send({"do": "stop", "id": id})
        finally:
            del self._began[slot]
            self._slots.release()
        self.answer_s += (time.monotonic() - began - self.answer_s) / (4 if self.answer_s else 1)

    async def ask(self, do: str, **wanted: Any) -> Event:
        """The one answer to what takes the engine no time; `do` is a method of edgekv.serve.engine.exchange.Exchange.

        Raises:
            EngineDiedError: the engine's process died.
            EdgeKVError: it cannot be done.
        """
        await self._started()
        id, stream = self._begin(do, wanted)
        try:
            event = await stream.get()
        finally:
            del self._streams[id]
        if "error" in event:
            raise event["error"]
        return event

    async def take(self, block: str, count: int, path: str) -> None:
        """Have the engine keep rows of a file, once a sequence is free for them.

        Raises:
            BusyError, EngineDiedError: as `answer` does.
            EdgeKVError: they are not what was asked for, or the engine refused them.
        """
        await self._take_slot(time.monotonic() + self.timeout_s)
        try:
            await self.ask("take", block=block, count=count, path=path)
        finally:
            self._slots.release()

    def _begin(self, do: str, wanted: dict[str, Any]) -> tuple[int, asyncio.Queue[Event]]:
        """Send the engine something to do; its id, and where what it says to that comes in."""
        id = next(self._ids)
        stream = self._streams[id] = asyncio.Queue()
        self._send({"do": do, "id": id, **wanted})
        return id, stream

    async def _take_slot(self, deadline: float) -> None:
        if self._slots.locked() and self.n_waiting >= self.queue:
            self.counts.n_busy += 1
            raise BusyError(
                f"{self.options.n_parallel} requests are answered and {self.n_waiting} wait; try again later"
            )
        self.n_waiting += 1
        try:
            await asyncio.wait_for(self._slots.acquire(), deadline - time.monotonic())
        finally:
            self.n_waiting -= 1

    async def _started(self) -> None:
        if self.failure:
            raise EngineDiedError(self.failure)
        await self._ready.wait()

    def _count(self, event: Event) -> None:
        self.counts.n_prompt += event.get("n_prompt", 0)
        if "finish" in event:
            self.counts.n_reused += event["n_reused"]
            self.counts.n_generated += event["n_generated"]

    def _send(self, message: Event) -> None:
        if not self._closing:
            self._writer.submit(self._child.send, message)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> str:
        """Pass on what the engine says until it dies; the cause."""
        while (message := self._child.receive()) is not None:
            loop.call_soon_threadsafe(self._dispatch, message)
        cause = self._child.cause_of_death()
        self._child.close()
        return cause

    def _dispatch(self, message: Event) -> None:
        self._heard_at = time.monotonic()
        if "stats" in message:
            self.stats = message["stats"]
        elif "catalogue" in message:
            self.catalogue = message["catalogue"]
        elif stream := self._streams.get(message["id"]):
            if "error" in message:
                message["error"] = from_wire(*message["error"])
            stream.put_nowait(message)

    def _died(self, cause: str) -> None:
        self.counts.n_deaths += 1
        self.stats, self.catalogue = {}, {}
        for stream in self._streams.values():
            error = EngineDiedError(f"{cause}; it is being started again, so send the request once more")
            stream.put_nowait({"error": error})

    async def _restart(self) -> None:
        pause = RESTART_S
        while not self._closing:
            try:
                await asyncio.to_thread(self.open)
                return
            except EdgeKVError as error:
                self.failure = f"the engine cannot be started again: {error}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_RESTART_S)

    async def _watch(self) -> None:
        """Kill an engine that has work and says nothing: its death is then handled as any other."""
        while True:
            await asyncio.sleep(SILENCE_S / 10)
            silent = time.monotonic() - self._heard_at
            if self._streams and self._ready.is_set() and silent > SILENCE_S:
                os.kill(self.pid, signal.SIGKILL)
