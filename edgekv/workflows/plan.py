"""Plans: predictions of whether a model fits a board, how fast it will be, and which options would do better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.devices.boards.profile import Board, find_board, load_boards
from edgekv.devices.predict.choices import Option, all_options, option
from edgekv.devices.predict.model_info import describe_model
from edgekv.devices.predict.plan import MIB, Plan, make_plan, recommend, this_board
from edgekv.devices.predict.route import RoutePlan, plan_route
from edgekv.devices.predict.tables import projected_report
from edgekv.devices.reporting.report import dumps
from edgekv.errors import InputError
from edgekv.files import atomic_path
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant.formats import KEEP
from edgekv.route.cost import Link
from edgekv.workflows.request import Request

THIS = "this"  # the machine that this runs on


@dataclass(frozen=True)
class PlanRequest(Request):
    """What to plan.

    Attributes:
        model: a GGUF file.
        board: a board's name or alias; "this" is this machine.
        ctx_size: tokens of context.
        ram_nbytes: RAM of the board, or for "this" all the memory that a program may use; by default the board's.
        threads: by default the board's fast cores.
        output: a file for `plan_board`'s plan as a projected report, which `edgekv compare` reads.
        command: recorded in the report as the command that made it.
    """

    model: Path
    board: str = THIS
    ctx_size: int = 4096
    cache_type: str = "f16"
    ram_nbytes: int | None = None
    threads: int | None = None
    output: Path | None = None
    force: bool = False
    command: str = "edgekv.plan_board"


@dataclass(frozen=True)
class PlanResult:
    """The plan asked for, and the options that fit, best first."""

    plan: Plan
    recommended: tuple[Plan, ...]


def plan_board(request: PlanRequest) -> PlanResult:
    """Predict memory, longest context, speed and sessions of a model on a board.

        result = edgekv.plan_board(edgekv.PlanRequest(model, board="pi-5", ctx_size=8192))
        print(result.plan.fits, result.plan.speeds[0].decode_tps)

    Raises:
        InputError: no such board, or a cache type that does not fit the model.
        ModelFileError, UnsupportedError: the model is malformed, or of a kind that is not handled.
        OutputError: the output exists without `force`, or cannot be written.
    """
    source = GGUFSource(request.model)
    chosen = _option(source, request)
    board = _board(request.board, chosen)
    sizes = _sizes(board, request)
    if request.board == THIS and request.ram_nbytes:
        board = _with_budget(board, request.ram_nbytes)
    plans = [make_plan(board, chosen, request.ctx_size, size, request.threads or 0) for size in sizes]
    plan = next((plan for plan in plans if plan.fits), plans[-1])
    better = recommend(board, all_options(source), request.ctx_size, plan.ram_nbytes)
    if request.output is not None:
        report = projected_report([plan], describe_model(source, request.model), request.command)
        with atomic_path(request.output, request.force) as partial:
            partial.write_text(dumps(report), encoding="utf-8")
    return PlanResult(plan, tuple(better))


def plan_all_boards(request: PlanRequest) -> tuple[Plan, ...]:
    """One plan for each board and size of RAM; raises as `plan_board` does."""
    chosen = _option(GGUFSource(request.model), request)
    return tuple(
        make_plan(board, chosen, request.ctx_size, size)
        for board in load_boards().values()
        for size in _sizes(board, request)
    )


@dataclass(frozen=True)
class RouteRequest(Request):
    """Two boards to plan a question between.

    Attributes:
        n_tokens: of the prompt.
        link: the connection between them.
        board, peer_board: where it is asked, and where its rows are; "this" is this machine.
    """

    model: Path
    n_tokens: int
    link: Link
    board: str = THIS
    peer_board: str = THIS
    cache_type: str = "f16"


def plan_question(request: RouteRequest) -> RoutePlan:
    """Predict what it costs to route a question, to fetch its rows, and to compute it anew.

    Raises:
        InputError: no such board, a cache type that does not fit the model, or a prompt that is too short.
        ModelFileError, UnsupportedError: the model is malformed, or of a kind that is not handled.
    """
    chosen = _option(GGUFSource(request.model), request)
    names = {name: _board(name, chosen) for name in {request.board, request.peer_board}}
    here, there = names[request.board], names[request.peer_board]
    return plan_route(chosen, here, there, request.n_tokens, request.link)


def _board(name: str, chosen: Option) -> Board:
    return find_board(name) if name != THIS else this_board(chosen.read_nbytes)[0]


def _sizes(board: Board, request: PlanRequest) -> list[int]:
    """The sizes of RAM in question, in bytes."""
    return [request.ram_nbytes] if request.ram_nbytes else [ram * MIB for ram in board.ram_mib]


def _option(source: GGUFSource, request: PlanRequest | RouteRequest) -> Option:
    try:
        return option(source, None, request.cache_type, KEEP)
    except ValueError as error:
        raise InputError(f"{request.model}: cache type {request.cache_type}: {error}") from error


def _with_budget(board: Board, nbytes: int) -> Board:
    """This machine with `nbytes` for a program: nothing is set aside for the system."""
    sources = {**board.sources, "os_mib": "none: --ram is what the program may use"}
    return replace(board, ram_mib=(max(1, nbytes >> 20),), os_mib=0, sources=sources)
