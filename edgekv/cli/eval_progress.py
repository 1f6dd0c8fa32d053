"""Progress of a long measurement on stderr: what is done, how long it will still take, the figures so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

SECONDS_BETWEEN_LINES = 20.0  # where stderr is a file or a pipe
SECONDS_BETWEEN_REDRAWS = 0.2

Advance = Callable[[int, int, str], None]


@contextmanager
def progress_line(what: str) -> Iterator[Advance]:
    """A function of (done, total, figures so far): redraws one line on a terminal, else prints one now and then.

    The time left is judged by this run's pace: what an earlier run left is not counted.
    """
    terminal = sys.stderr.isatty()
    started = printed = time.monotonic()
    first: int | None = None

    def advance(done: int, total: int, figures: str) -> None:
        nonlocal first, printed
        now = time.monotonic()
        if first is None:
            first = done
        wait = SECONDS_BETWEEN_REDRAWS if terminal else SECONDS_BETWEEN_LINES
        if now - printed < wait and done < total:
            return
        printed = now
        line = f"{what} {done}/{total}"
        if done > first and done < total:
            line += f", {clock((now - started) / (done - first) * (total - done))} left"
        line += f"  {figures}" if figures else ""
        click.echo(f"\r\x1b[K{line}" if terminal else line, nl=not terminal, err=True)

    try:
        yield advance
    finally:
        if terminal:
            click.echo("\r\x1b[K", nl=False, err=True)


def clock(seconds: float) -> str:
    """A duration as 0:42, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
