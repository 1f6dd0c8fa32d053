"""Progress of a long measurement on stderr: what is done, how long it will still take, the figures so far."""

from __future__ import annotations

import math
import sys
import time

import click

SECONDS_BETWEEN_LINES = 20.0  # where stderr is a file or a pipe
SECONDS_BETWEEN_REDRAWS = 0.2


class ProgressLine:
    """An edgekv.progress.Progress: one line redrawn on a terminal, else a line now and then.

    The time left is judged by this run's pace: what an earlier run left is not counted.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._shown_at = -math.inf
        self._start: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, figures: str = "", /) -> None:
        now = time.monotonic()
        self._start = self._start or (now, done)
        started, first = self._start
        if done >= total:
            if self._terminal:
                click.echo("\r\x1b[K", nl=False, err=True)
            return
        if now - self._shown_at < (SECONDS_BETWEEN_REDRAWS if self._terminal else SECONDS_BETWEEN_LINES):
            return
        self._shown_at = now
        line = f"{self._what} {done}/{total}"
        if done > first:
            line += f", {clock((now - started) / (done - first) * (total - done))} left"
        line += f"  {figures}" if figures else ""
        click.echo(f"\r\x1b[K{line}" if self._terminal else line, nl=not self._terminal, err=True)


def clock(seconds: float) -> str:
    """A duration as 0:42, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
