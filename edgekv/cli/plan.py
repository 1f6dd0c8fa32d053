"""`edgekv plan`: what a model will do on a board."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekv.devices.boards.profile import Board
    from edgekv.devices.predict.choices import Option
    from edgekv.devices.predict.plan import Plan

DOES_NOT_FIT = 1


@click.command("plan")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--board", "board_name", default="this", show_default=True, help="A board, or this machine.")
@click.option("--boards", is_flag=True, help="One line for every board and size of RAM.")
@click.option("--list-boards", is_flag=True, help="List the board profiles and leave.")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of context.")
@click.option("--cache", "cache_type", default="f16", show_default=True, help="Cache type.")
@click.option("--ram", help="RAM of the board, or all a program may use: 512M, 2G.  [default: the board's]")
@click.option("--threads", type=click.IntRange(1), help="Engine threads.  [default: the board's fast cores]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a projected report for compare.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print plans as JSON.")
def command(
    model: Path | None,
    board_name: str,
    boards: bool,
    list_boards: bool,
    context: int,
    cache_type: str,
    ram: str | None,
    threads: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Predict memory, longest context, speed and sessions of a model on a board, and what would serve better.

    Memory is exact where arithmetic is (weights, cache) and modelled where not; speed follows from bandwidth
    and compute. Everything printed is projected. Exit code 1: it does not fit.

    \b
    edgekv plan model.gguf --board pi-4b --context 8192
    edgekv plan model.gguf --board pi-zero-2w --cache q8_0
    edgekv plan model.gguf --ram 512M --context 8192
    edgekv plan model.gguf --boards
    """
    from edgekv.devices.predict.tables import boards_table
    from edgekv.devices.reporting.tables import as_text

    if list_boards:
        click.echo(as_text(boards_table()))
        return
    if model is None:
        raise click.UsageError("name a model, as in: edgekv plan model.gguf --board pi-5")
    nbytes = parse_size(ram) if ram else None
    if boards:
        plans = plans_of_all_boards(model, context, cache_type, nbytes)
        _show_boards(plans, as_json)
        return
    plan, better = plan_of_one_board(model, board_name, context, cache_type, nbytes, threads)
    _write(output, force, model, [plan])
    _show_one(plan, better, as_json)
    if not plan.fits:
        sys.exit(DOES_NOT_FIT)


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M, 1.5G or 800000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    nbytes = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if nbytes < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 512M or 2G", param_hint="--ram")
    return int(nbytes)


def plan_of_one_board(
    model: Path, name: str, context: int, cache_type: str, nbytes: int | None, threads: int | None
) -> tuple[Plan, list[Plan]]:
    """The plan asked for, and the options that fit, best first."""
    from edgekv.devices.boards.profile import find_board
    from edgekv.devices.predict.choices import all_options
    from edgekv.devices.predict.plan import MIB, make_plan, recommend, this_board
    from edgekv.models.gguf.source import GGUFSource

    source = GGUFSource(model)
    chosen = _option(source, cache_type, model)
    board = find_board(name) if name != "this" else this_board(chosen.read_nbytes)[0]
    sizes = [nbytes] if nbytes else [ram * MIB for ram in board.ram_mib]
    board = _with_budget(board, nbytes) if name == "this" and nbytes else board
    plans = [make_plan(board, chosen, context, size, threads or 0) for size in sizes]
    plan = next((plan for plan in plans if plan.fits), plans[-1])
    options = all_options(source, stored_nbytes)
    return plan, recommend(board, options, context, plan.ram_nbytes)


def plans_of_all_boards(model: Path, context: int, cache_type: str, nbytes: int | None) -> list[Plan]:
    """One plan for each board and size of RAM."""
    from edgekv.devices.boards.profile import load_boards
    from edgekv.devices.predict.plan import MIB, make_plan
    from edgekv.models.gguf.source import GGUFSource

    chosen = _option(GGUFSource(model), cache_type, model)
    return [
        make_plan(board, chosen, context, size)
        for board in load_boards().values()
        for size in ([nbytes] if nbytes else [ram * MIB for ram in board.ram_mib])
    ]


def stored_nbytes(name: str, shape: tuple[int, ...], weights: str) -> int:
    """Bytes of a tensor that `edgekv convert --weights` writes."""
    import math

    import gguf

    from edgekv.export.gguf.write import WEIGHT_TYPES, tensor_type

    block, size = gguf.GGML_QUANT_SIZES[tensor_type(name, shape, WEIGHT_TYPES[weights])]
    return math.prod(shape) // int(block) * int(size)


def _option(source: object, cache_type: str, model: Path) -> Option:
    from edgekv.devices.predict.choices import KEEP, option
    from edgekv.errors import InputError
    from edgekv.models.gguf.source import GGUFSource

    assert isinstance(source, GGUFSource)
    try:
        return option(source, None, cache_type, KEEP, stored_nbytes)
    except ValueError as error:
        raise InputError(f"{model}: cache type {cache_type}: {error}") from error


def _with_budget(board: Board, nbytes: int) -> Board:
    """This machine with `--ram` as all that a program may use: no system is taken off it."""
    from dataclasses import replace

    sources = {**board.sources, "os_mib": "none: --ram is what the program may use"}
    return replace(board, ram_mib=(max(1, nbytes >> 20),), os_mib=0, sources=sources)


def _write(output: Path | None, force: bool, model: Path, plans: Sequence[Plan]) -> None:
    if output is None:
        return
    from edgekv.devices.predict.model_info import describe_model
    from edgekv.devices.predict.tables import projected_report
    from edgekv.devices.reporting.report import dumps
    from edgekv.files import atomic_path
    from edgekv.models.gguf.source import GGUFSource

    with atomic_path(output, force) as partial:
        info = describe_model(GGUFSource(model), model)
        report = projected_report(plans, info, "edgekv " + " ".join(sys.argv[1:]))
        partial.write_text(dumps(report), encoding="utf-8")


def _show_boards(plans: Sequence[Plan], as_json: bool) -> None:
    from edgekv.devices.predict.tables import plan_as_dict, plans_table
    from edgekv.devices.reporting.tables import as_text

    if as_json:
        click.echo(json.dumps([plan_as_dict(plan) for plan in plans], indent=1))
        return
    title = f"{plans[0].option.spec.name}, cache {plans[0].option.cache_type}, context {plans[0].context:,} (projected)"
    click.echo(as_text(plans_table(title, plans, "board")))
    click.echo(
        f"decode t/s with an empty cache and at depth {plans[0].speeds[-1].depth:,}; t/J: tokens a joule"
    )


def _show_one(plan: Plan, better: Sequence[Plan], as_json: bool) -> None:
    from edgekv.devices.predict.tables import memory_lines, plan_as_dict, plans_table, speed_table
    from edgekv.devices.reporting.tables import as_text

    if as_json:
        found = {"plan": plan_as_dict(plan), "recommended": [plan_as_dict(other) for other in better[:5]]}
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"{plan.option.spec.name} on {plan.board.name} ({plan.board.soc})")
    click.echo("\nMemory (projected)")
    click.echo("\n".join(memory_lines(plan)))
    click.echo("\n" + as_text(speed_table(plan)))
    if plan.tokens_per_joule:
        click.echo(f"tokens a joule: {plan.tokens_per_joule:.2g} ({plan.board.decode_w:g} W)")
    if better:
        title = f"What fits {plan.context:,} tokens, least expected loss first (projected)"
        click.echo("\n" + as_text(plans_table(title, better[:5], "option")))
        advice = "; measure its loss with `edgekv eval`" if better[0].option.steps else ", nothing is lost"
        click.echo(f"recommended: {better[0].option.label}{advice}")
    else:
        click.echo(f"\nno conversion, cache type or weight type makes {plan.context:,} tokens fit")
    for note in plan.notes:
        click.echo(f"note: {note}")
