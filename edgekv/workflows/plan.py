"""Plans: predictions of whether a model fits a board, how fast it will be, and which options would do better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.devices.boards.profile import Board, find_board, load_boards
from edgekv.devices.predict.choices import Option, all_options, option
from edgekv.devices.predict.model_info import describe_model
from edgekv.devices.predict.plan import MIB, Plan, make_plan, recommend, this_board
from edgekv.devices.predict.tables import projected_report
from edgekv.devices.reporting.report import dumps
from edgekv.errors import InputError
from edgekv.files import atomic_path
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant.formats import KEEP
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
    """

    model: Path
    board: str = THIS
    ctx_size: int = 4096
    cache_type: str = "f16"
    ram_nbytes: int | None = None
    threads: int | None = None


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
    """
    source = GGUFSource(request.model)
    chosen = _option(source, request)
    board = find_board(request.board) if request.board != THIS else this_board(chosen.read_nbytes)[0]
    nbytes = request.ram_nbytes
    sizes = [nbytes] if nbytes else [ram * MIB for ram in board.ram_mib]
    if request.board == THIS and nbytes:
        board = _with_budget(board, nbytes)
    plans = [make_plan(board, chosen, request.ctx_size, size, request.threads or 0) for size in sizes]
    plan = next((plan for plan in plans if plan.fits), plans[-1])
    better = recommend(board, all_options(source), request.ctx_size, plan.ram_nbytes)
    return PlanResult(plan, tuple(better))


def plan_all_boards(request: PlanRequest) -> tuple[Plan, ...]:
    """One plan for each board and size of RAM; raises as `plan_board` does."""
    chosen = _option(GGUFSource(request.model), request)
    return tuple(
        make_plan(board, chosen, request.ctx_size, size)
        for board in load_boards().values()
        for size in ([request.ram_nbytes] if request.ram_nbytes else [ram * MIB for ram in board.ram_mib])
    )


def write_plan(plans: Sequence[Plan], model: Path, output: Path, force: bool, command: str) -> None:
    """Write plans as a projected report, for `edgekv compare`.

    Raises:
        OutputError: the output exists without `force`, or cannot be written.
    """
    with atomic_path(output, force) as partial:
        report = projected_report(plans, describe_model(GGUFSource(model), model), command)
        partial.write_text(dumps(report), encoding="utf-8")


def _option(source: GGUFSource, request: PlanRequest) -> Option:
    try:
        return option(source, None, request.cache_type, KEEP)
    except ValueError as error:
        raise InputError(f"{request.model}: cache type {request.cache_type}: {error}") from error


def _with_budget(board: Board, nbytes: int) -> Board:
    """This machine with `nbytes` for a program: nothing is set aside for the system."""
    sources = {**board.sources, "os_mib": "none: --ram is what the program may use"}
    return replace(board, ram_mib=(max(1, nbytes >> 20),), os_mib=0, sources=sources)
