"""Sends each request where its answer costs least, and to the next best place if that fails.

However peers fail, an answer begins at most as much later as its prefill here is predicted to take, or MIN_PATIENCE_S
if that is more: so long are peers tried, and then it is computed here.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekv.errors import BackendError, InputError
from edgekv.serve.engine_process import EngineProcess, Event
from edgekv.serve.peers.peer import Peer, PeerError, Tell
from edgekv.serve.peers.ways import Plan, find_ways
from edgekv.serve.peers.wire import JobWanted
from edgekv.serve.settings import ServerSettings

MAX_HEADER_NBYTES = 2**20  # of a file of rows


@dataclass
class RouterCounts:
    """What has happened since the server started: answers of peers, rows fetched, and tries that failed."""

    n_routed: int = 0
    n_fetched: int = 0
    n_failed: int = 0


@dataclass
class Said:
    """What has been given out of one answer: its tokens, and whether it has begun."""

    tokens: list[int] = field(default_factory=list)
    begun: bool = False

    def note(self, event: Event) -> bool:
        """Note an event; whether it is to be given out, as a second begin is not."""
        if "token" in event and "finish" not in event:
            self.tokens.append(event["token"])
        again = "n_prompt" in event and self.begun
        self.begun = self.begun or "n_prompt" in event
        return not again


class Router:
    """Over an engine and its peers; `live` has to run beside it.

    Args:
        folder: for files with rows that are on their way.
        tell: is told why a peer is not asked, and when it is again.
    """

    def __init__(self, engine: EngineProcess, settings: ServerSettings, folder: Path, tell: Tell) -> None:
        self._engine, self._folder = engine, folder
        known = engine.about["fingerprint"], engine.about["n_ctx"], tell
        self.peers = [Peer(url, settings.peer_key, *known) for url in settings.peers]
        self.counts = RouterCounts()
        self._names = itertools.count()

    async def live(self) -> None:
        """Keep what is known of the peers new, until this is cancelled."""
        await asyncio.gather(*(peer.live() for peer in self.peers))

    def figures(self) -> dict[str, int]:
        """For the server's metrics."""
        return {
            "peers": len(self.peers),
            "peers_usable": sum(peer.usable for peer in self.peers),
            "routed_total": self.counts.n_routed,
            "fetched_total": self.counts.n_fetched,
            "peer_failures_total": self.counts.n_failed,
        }

    async def answer(self, **job: Any) -> AsyncIterator[Event]:
        """The events of an answer, from wherever it costs least; arguments and errors are EngineProcess.answer's."""
        said = Said()
        ways = await find_ways(self._engine, self.peers, job)
        deadline = time.monotonic() + ways.patience_s
        for plan in ways.worth_trying():
            if time.monotonic() >= deadline:
                break
            try:
                async with aclosing(self.over(plan, job, said.tokens, deadline)) as events:
                    async for event in events:
                        if said.note(event):
                            yield event
                return
            except PeerError:
                self.counts.n_failed += 1
                plan.peer.failed()
        async with aclosing(self._engine.answer(**job, said=said.tokens)) as events:  # type: ignore[type-var]
            async for event in events:
                if said.note(event):
                    yield event

    async def over(
        self, plan: Plan, job: dict[str, Any], said: Sequence[int], deadline: float
    ) -> AsyncGenerator[Event, None]:
        """The events of an answer by one way, behind the tokens that were said already.

        Raises:
            PeerError: the peer failed, or did not give the first token or its rows until the deadline.
            EdgeKVError, TimeoutError: as EngineProcess.answer does, once the rows are here.
        """
        source: AsyncIterator[Event]
        began, first = time.monotonic(), True
        if plan.way == "fetch":
            await self._fetch(plan, deadline)
            self.counts.n_fetched += 1
            source = self._engine.answer(**job, said=said)
        else:
            plan.peer.promise(plan.cost.compute_s)
            source = plan.peer.answer(JobWanted(**job, said=tuple(said)), deadline)
        async with aclosing(source) as events:  # type: ignore[type-var]
            async for event in events:
                if first and plan.way == "route" and plan.cost.compute_s and "token" in event:
                    plan.peer.took(time.monotonic() - began - plan.cost.first_token_s)
                    first = False
                yield event
        self.counts.n_routed += plan.way == "route"

    async def _fetch(self, plan: Plan, deadline: float) -> None:
        """Have the engine keep a peer's rows; raises PeerError if they do not come, or are not what was asked for."""
        path = self._folder / f"{next(self._names)}.rows"
        nbytes = plan.held * (self._engine.about["row_nbytes"] + 8) + MAX_HEADER_NBYTES
        try:
            await plan.peer.fetch(plan.block, plan.held, path, nbytes, deadline - time.monotonic())
            await self._engine.take(plan.block.hex(), plan.held, str(path))
        except (InputError, BackendError) as error:
            raise PeerError(f"{plan.peer.url}: {error}") from error
        finally:
            path.unlink(missing_ok=True)
