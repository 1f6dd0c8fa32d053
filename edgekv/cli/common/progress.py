"""Progress on stderr: what is done, how long it will still take, the figures so far."""

from __future__ import annotations

import math
import sys
import time

import click

from edgekv.progress import Progress, Stages, silent

SECONDS_BETWEEN_LINES = 20.0  # where stderr is a file or a pipe
SECONDS_BETWEEN_REDRAWS = 0.2


class ProgressLine:
    """An edgekv.progress.Progress: one line redrawn on a terminal, else a line every 20 seconds.

    The time left is judged by this run's pace: what an earlier run left is not counted.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._shown_at = -math.inf
        self._start: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, figures: str = "", /) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now, done
            self._shown_at = -math.inf if self._terminal else now  # a short stage needs no line in a log
        started, first = self._start
        if 0 < total <= done:
            if self._terminal:
                click.echo("\r\x1b[K", nl=False, err=True)
            return
        if now - self._shown_at < (SECONDS_BETWEEN_REDRAWS if self._terminal else SECONDS_BETWEEN_LINES):
            return
        self._shown_at = now
        line = f"{self._what} {done}/{total}" if total else f"{self._what} {done:,}"
        if first < done < total:
            line += f", {clock((now - started) / (done - first) * (total - done))} left"
        line += f"  {figures}" if figures else ""
        click.echo(f"\r\x1b[K{line}" if self._terminal else line, nl=not self._terminal, err=True)


def begin(stage: str, /) -> Progress:
    """A stage that is shown, from its beginning on a terminal."""
    line = ProgressLine(stage)
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{stage} ...", nl=False, err=True)
    return line


def stages(quiet: bool) -> Stages:
    """The stages of a workflow as lines on stderr, or none for machines."""
    return silent if quiet else begin


def clock(seconds: float) -> str:
    """A duration as 0:42, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
