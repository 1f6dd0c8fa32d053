"""The ways to answer a request, each with its cost as the engine here and those of peers were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekv.documents import decode
from edgekv.errors import EdgeKVError
from edgekv.route.cost import Cost, Prefill, Question, Site, Way, fetch_cost, local_cost, route_cost
from edgekv.serve.engine.blocks import BLOCK
from edgekv.serve.engine.rates import RatesNow
from edgekv.serve.engine_process import EngineProcess
from edgekv.serve.peers.peer import Peer

WORTH = 0.95  # of the time here is what a peer may take: less of a gain is lost in what was measured badly
MIN_PATIENCE_S = 1.0
MAX_TRIES = 2  # of peers, per request
EXPECTED_ANSWER = 128  # tokens, of requests that do not say at most how many


@dataclass(frozen=True)
class Plan:
    """A way to answer a request over a peer, which holds its first `held` tokens, until the block of this hash."""

    way: Way
    cost: Cost
    peer: Peer
    held: int = 0
    block: bytes = b""


@dataclass(frozen=True)
class Ways:
    """All ways to answer a request.

    Attributes:
        local: the cost of computing it here; None where that cannot be told.
        over_peers: the others, the cheapest first.
        patience_s: how long peers are tried.
    """

    local: Cost | None = None
    over_peers: tuple[Plan, ...] = ()
    patience_s: float = 0.0

    def worth_trying(self) -> Sequence[Plan]:
        """Those that cost less than computing it here, as far as they are tried: one over each of a few peers."""
        most = float("inf") if self.local is None else WORTH * self.local.total_s
        best: dict[Peer, Plan] = {}
        for plan in self.over_peers:
            if plan.cost.total_s < most:
                best.setdefault(plan.peer, plan)
        return list(best.values())[:MAX_TRIES]


async def find_ways(engine: EngineProcess, peers: Sequence[Peer], job: dict[str, Any]) -> Ways:
    """The ways to answer a job, whose arguments are those of EngineProcess.answer."""
    usable = [peer for peer in peers if peer.usable]
    if not usable or "rates" not in engine.stats:
        return Ways()
    asked = {name: job[name] for name in ("messages", "text", "tokens", "packs")}
    try:
        seen = await engine.ask("look", **asked)
    except EdgeKVError:  # it cannot be read here; perhaps it names packs that others have
        return Ways(None, _with_packs(usable, job["packs"]), engine.timeout_s)
    if seen["n_prompt"] >= engine.about["n_ctx"]:
        return Ways()  # it is refused here
    question = Question(
        n_tokens=seen["n_prompt"],
        n_answer=job["max_tokens"] or EXPECTED_ANSWER,
        text_nbytes=_weight(job),
        row_nbytes=engine.about["row_nbytes"],
        encode_s=seen["seconds"],
    )
    here, blocks = _site(engine), [bytes.fromhex(block) for block in seen["blocks"]]
    local = local_cost(question, here, seen["n_held"])
    plans = [plan for peer in usable for plan in _over(peer, question, here, blocks, seen["n_held"])]
    return Ways(local, _sorted(plans), max(MIN_PATIENCE_S, local.first_token_s))


def _site(engine: EngineProcess) -> Site:
    rates = decode(RatesNow, engine.stats["rates"])
    prefill, short = Prefill(*rates.prefill), Prefill(*rates.short)
    return Site(prefill, rates.decode_s, engine.wait_s, rates.save_s, rates.load_s, short)


def _over(peer: Peer, question: Question, here: Site, blocks: list[bytes], held_here: int) -> list[Plan]:
    """The ways over one peer; rows are only worth fetching where it has more of them than are here."""
    depth = peer.catalogue.depth(blocks)
    held, link, there = depth * BLOCK, peer.link, peer.site
    longer = replace(link, round_trip_s=link.round_trip_s + peer.extra_s)
    plans = [Plan("route", route_cost(question, longer, there, held), peer, held)]
    if held > held_here:
        cost = fetch_cost(question, link, there, here, held)
        plans.append(Plan("fetch", cost, peer, held, blocks[depth - 1]))
    return plans


def _with_packs(peers: Sequence[Peer], packs: Sequence[str]) -> tuple[Plan, ...]:
    """Peers that have all of these packs, the nearest first."""
    having = [peer for peer in peers if packs and set(packs) <= set(peer.packs)]
    return _sorted([Plan("route", Cost(probe_s=peer.link.round_trip_s), peer) for peer in having])


def _sorted(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    return tuple(sorted(plans, key=lambda plan: plan.cost.total_s))


def _weight(job: dict[str, Any]) -> int:
    """About the bytes of a request's prompt."""
    texts = [message["content"] for message in job["messages"] or []]
    return sum(map(len, texts)) + len(job["text"] or "") + 6 * len(job["tokens"] or [])
