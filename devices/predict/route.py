"""A question between two boards, predicted: sent to the one that has its rows, the rows fetched, or computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgekv.devices.boards.profile import Board
from edgekv.devices.predict.choices import Option
from edgekv.devices.predict.speed import bytes_per_s, decode_s, load_coefficients, prefill_s
from edgekv.devices.reporting.text_table import Table, seconds
from edgekv.errors import InputError
from edgekv.route.cost import (
    Cost,
    Link,
    Prefill,
    Question,
    Site,
    Way,
    cheapest,
    fetch_cost,
    local_cost,
    route_cost,
)

BLOCK = 16  # tokens by which rows are known; the last block of a prompt is the question itself
ANSWER = 128  # tokens
CHARS = 4  # per token
COPIES = 4  # how often rows are read to be put into a file, and again to be checked and put into an engine: assumed


@dataclass(frozen=True)
class RoutePlan:
    """Costs of each way for a prompt of which `held` tokens are cached `there` and none `here`. All are projected."""

    here: Board
    there: Board
    link: Link
    question: Question
    held: int
    costs: Mapping[Way, Cost]

    @property
    def cheapest(self) -> Way:
        """The way whose answer is complete first."""
        return cheapest(self.costs)


def plan_route(option: Option, here: Board, there: Board, n_tokens: int, link: Link) -> RoutePlan:
    """Predict the three ways for a prompt of `n_tokens`, all but its last block cached there.

    Raises:
        InputError: the prompt is too short, or a board's prefill is not known.
    """
    held = (n_tokens - 1) // BLOCK * BLOCK
    if not held:
        raise InputError(f"a prompt of {n_tokens} tokens has no block of {BLOCK} to share; take a longer one")
    row_nbytes = round(option.spec.kv_bytes_per_token(option.cache_type))
    question = Question(n_tokens, ANSWER, CHARS * n_tokens, row_nbytes)
    near, far = (_site(option, board, n_tokens) for board in (here, there))
    costs: dict[Way, Cost] = {
        "local": local_cost(question, near, 0),
        "fetch": fetch_cost(question, link, far, near, held),
        "route": route_cost(question, link, far, held),
    }
    return RoutePlan(here, there, link, question, held, costs)


def _site(option: Option, board: Board, depth: int) -> Site:
    """An idle board on all its cores."""
    c, work, threads = load_coefficients()[board.kind], option.workload(depth), board.cores
    first, second = (prefill_s(work, board, threads, 1, at, c) for at in (0, 1))
    if first is None or second is None:
        raise InputError(f"the prefill of {board.name} is not known; name another board")
    pair_s = second - first  # of a token and one more row that it attends to
    byte_s = COPIES / bytes_per_s(board, threads, c)
    answer_s = decode_s(work, board, threads, depth, c)
    return Site(Prefill(0.0, first - pair_s / 2, pair_s), answer_s, save_s=byte_s, load_s=byte_s)


def route_table(plan: RoutePlan) -> Table:
    """One row per way."""
    rows = [
        {
            "way": way,
            "round trip": seconds(cost.probe_s),
            "transfer": seconds(cost.transfer_s),
            "prefill": seconds(cost.compute_s),
            "copies": seconds(cost.merge_s),
            "first token": seconds(cost.first_token_s),
            f"answer of {ANSWER}": seconds(cost.total_s),
        }
        for way, cost in plan.costs.items()
    ]
    kilobytes = plan.held * plan.question.row_nbytes / 1e3
    title = (
        f"{plan.question.n_tokens:,} tokens asked on {plan.here.name}, {plan.held:,} of them cached on "
        f"{plan.there.name} ({kilobytes:,.0f} kB) (projected)"
    )
    return Table.of(title, "way", rows)


def route_as_dict(plan: RoutePlan) -> dict[str, Any]:
    """The plan as values for JSON."""
    return {
        "provenance": "projected",
        "here": plan.here.key,
        "there": plan.there.key,
        "link": asdict(plan.link),
        "question": asdict(plan.question),
        "held": plan.held,
        "ways": {
            way: {**asdict(cost), "first_token_s": cost.first_token_s, "total_s": cost.total_s}
            for way, cost in plan.costs.items()
        },
        "cheapest": plan.cheapest,
    }
