"""`edgekv plan`: predicted memory and speed of a model on a board."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import command_line, print_json
from edgekv.devices.reporting.text_table import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekv.devices.predict.plan import Plan
    from edgekv.devices.predict.route import RoutePlan
    from edgekv.route.cost import Link
    from edgekv.workflows.plan import PlanResult

DOES_NOT_FIT = 1


@options.command("plan")
@options.model(required=False)
@click.option("--board", default="this", show_default=True, help="A board, or this machine.")
@click.option("--boards", is_flag=True, help="One line for every board and size of RAM.")
@click.option("--list-boards", is_flag=True, help="List the board profiles and leave.")
@options.ctx_size("Tokens of context.", default=4096)
@options.cache_type("Cache type.", default="f16")
@click.option("--ram", help="RAM of the board, or all a program may use: 512M, 2G.  [default: the board's]")
@click.option(
    "--route",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Where a prompt of so many tokens is best answered.",
)
@click.option("--peer-board", help="With --route: the board that has its rows.  [default: the same]")
@click.option(
    "--link", default="117,0.5", show_default=True, help="With --route: MB/s and ms of a round trip."
)
@options.threads()
@options.output("Write a projected report for compare.", required=False)
@options.force()
@options.as_json("Print plans as JSON.")
def command(
    model: Path | None,
    board: str,
    boards: bool,
    list_boards: bool,
    ctx_size: int,
    cache_type: str,
    ram: str | None,
    route: int | None,
    peer_board: str | None,
    link: str,
    threads: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Predict memory, longest context, speed and sessions of a model on a board, and which options would do better.

    Memory is exact where arithmetic is (weights, cache) and modelled where not; speed follows from bandwidth
    and compute. Everything printed is projected. Exit code 1: it does not fit.

    \b
    edgekv plan model.gguf --board pi-4b -c 8192
    edgekv plan model.gguf --board pi-zero-2w --cache-type q8_0
    edgekv plan model.gguf --ram 512M -c 8192
    edgekv plan model.gguf --boards
    edgekv plan model.gguf --board pi-4b --route 2000 --link 5,4
    """
    from edgekv.devices.predict import tables
    from edgekv.workflows import plan as plans

    if list_boards:
        click.echo(as_text(tables.boards_table()))
        return
    if model is None:
        raise click.UsageError("name a model, as in: edgekv plan model.gguf --board pi-5")
    if route is not None:
        asked = plans.RouteRequest(model, route, parse_link(link), board, peer_board or board, cache_type)
        _show_route(plans.plan_question(asked), as_json)
        return
    nbytes = parse_size(ram) if ram else None
    request = plans.PlanRequest(
        model, board, ctx_size, cache_type, nbytes, threads, output, force, command_line()
    )
    if boards:
        _show_boards(plans.plan_all_boards(request), as_json)
        return
    result = plans.plan_board(request)
    _show_one(result, as_json)
    if not result.plan.fits:
        sys.exit(DOES_NOT_FIT)


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M, 1.5G or 800000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    nbytes = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if nbytes < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 512M or 2G", param_hint="--ram")
    return int(nbytes)


def parse_link(text: str) -> Link:
    """The link of "117,0.5": MB/s, and milliseconds of a round trip."""
    from edgekv.route.cost import Link

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*", text)
    if not match or not float(match[1]):
        raise click.BadParameter(f"{text!r} is no link such as 117,0.5", param_hint="--link")
    return Link(float(match[2]) / 1e3, float(match[1]) * 1e6)


def _show_route(plan: RoutePlan, as_json: bool) -> None:
    from edgekv.devices.predict.route import route_as_dict, route_table

    if as_json:
        print_json(route_as_dict(plan))
        return
    click.echo(as_text(route_table(plan)))
    click.echo(f"cheapest: {plan.cheapest}")


def _show_boards(plans: Sequence[Plan], as_json: bool) -> None:
    from edgekv.devices.predict import tables

    if as_json:
        print_json([tables.plan_as_dict(plan) for plan in plans])
        return
    title = f"{plans[0].option.spec.name}, cache {plans[0].option.cache_type}, context {plans[0].context:,} (projected)"
    click.echo(as_text(tables.plans_table(title, plans, "board")))
    click.echo(
        f"decode t/s with an empty cache and at depth {plans[0].speeds[-1].depth:,}; t/J: tokens per joule"
    )


def _show_one(result: PlanResult, as_json: bool) -> None:
    from edgekv.devices.predict import tables

    plan, better = result.plan, result.recommended
    if as_json:
        found = [tables.plan_as_dict(other) for other in better[:5]]
        print_json({"plan": tables.plan_as_dict(plan), "recommended": found})
        return
    click.echo(f"{plan.option.spec.name} on {plan.board.name} ({plan.board.soc})")
    click.echo("\nMemory (projected)")
    click.echo("\n".join(tables.memory_lines(plan)))
    click.echo("\n" + as_text(tables.speed_table(plan)))
    if plan.tokens_per_joule:
        click.echo(f"tokens per joule: {plan.tokens_per_joule:.2g} ({plan.board.decode_w:g} W)")
    if better:
        title = f"What fits {plan.context:,} tokens, least expected loss first (projected)"
        click.echo("\n" + as_text(tables.plans_table(title, better[:5], "option")))
        advice = "; measure its loss with `edgekv eval`" if better[0].option.steps else ", nothing is lost"
        click.echo(f"recommended: {better[0].option.label}{advice}")
    else:
        click.echo(f"\nno conversion, cache type or weight type makes {plan.context:,} tokens fit")
    for note in plan.notes:
        click.echo(f"note: {note}")
