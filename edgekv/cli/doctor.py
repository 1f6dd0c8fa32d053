"""`edgekv doctor`: checks of whether this machine is ready."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "unknown": "?   "}
NOT_READY = 1


@options.command("doctor")
@options.as_json("Print the checks as JSON.")
def command(as_json: bool) -> None:
    """Check CPU, engine, memory, heat and packages, and say what to do about what is wrong.

    Native code is tried in a child process, so that a llama.cpp built for another CPU cannot end this one.
    Exit code 0: ready, perhaps with warnings. 1: something must be repaired first.

    \b
    edgekv doctor
    edgekv doctor --json | jq '.checks[] | select(.status == "fail")'
    """
    from edgekv.devices.doctor.checks import examine, is_ready

    checks = examine()
    ready = is_ready(checks)
    if as_json:
        print_json({"ready": ready, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{MARKS[check.status]}  {check.name:<{width}}  {check.found}")
            if check.advice:
                click.echo(f"      {'':<{width}}  -> {check.advice}")
        click.echo("ready" if ready else "not ready: repair what FAILed")
    if not ready:
        sys.exit(NOT_READY)
