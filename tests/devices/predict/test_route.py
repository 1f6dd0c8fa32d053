"""`edgekv plan --route`: the three ways between two boards, from the same arithmetic as plans and servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgekv.cli.main import cli
from edgekv.devices.boards.profile import find_board
from edgekv.devices.predict.choices import option
from edgekv.devices.predict.route import plan_route
from edgekv.devices.predict.speed import load_coefficients, prefill_s
from edgekv.errors import InputError
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant.formats import KEEP
from edgekv.route.cost import Link

GIGABIT, BAD = Link(0.0005, 117e6), Link(0.2, 2e4)


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)])


def test_a_prefill_is_that_of_the_plan(smollm2: Path) -> None:
    chosen, board = option(GGUFSource(smollm2), None, "q4_0", KEEP), find_board("pi-5")
    found = plan_route(chosen, board, board, 2000, GIGABIT).costs
    expected = prefill_s(chosen.workload(2000), board, board.cores, 2000, 0, load_coefficients()[board.kind])
    assert found["local"].first_token_s == pytest.approx(expected)
    assert found["route"].compute_s < found["local"].compute_s / 20
    assert found["route"].compute_s == found["fetch"].compute_s


def test_the_link_decides(smollm2: Path) -> None:
    chosen = option(GGUFSource(smollm2), None, "f16", KEEP)
    slow, quick = find_board("pi-zero-2w"), find_board("pi-5")
    assert plan_route(chosen, slow, quick, 2000, GIGABIT).cheapest == "route"
    assert plan_route(chosen, quick, slow, 2000, GIGABIT).cheapest == "fetch"  # it would answer slowly
    assert plan_route(chosen, quick, slow, 2000, BAD).cheapest == "local"
    with pytest.raises(InputError, match="no block of 16"):
        plan_route(chosen, quick, slow, 16, GIGABIT)


def test_the_command(smollm2: Path) -> None:
    arguments = (smollm2, "--board", "pi-4b", "--route", 2000, "--peer-board", "pi-5", "--link", "5,4")
    shown = plan(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "2,000 tokens asked on Raspberry Pi 4" in shown.output
    assert "cheapest: route" in shown.output
    found = json.loads(plan(*arguments, "--json").output)
    assert found["held"] == 1984
    assert found["link"] == {"round_trip_s": 0.004, "bytes_per_s": 5e6}
    assert found["cheapest"] == min(found["ways"], key=lambda way: found["ways"][way]["total_s"])
    assert "no link such as" in plan(smollm2, "--route", 2000, "--link", "fast").output
