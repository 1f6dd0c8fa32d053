"""Showing an answer while it is made, and its figures afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from types import FrameType

    from edgekv.backends.isolated.backend import IsolatedBackend
    from edgekv.chat.generate import Finish, Generator, Step, Timings
    from edgekv.chat.session import ChatSession, Dropped

# A model's text must not move the cursor, set the title or write the clipboard (escape sequences).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    finish: Finish
    timings: Timings


def show_answer(session: ChatSession, events: Iterator[Step | Dropped], *, visible: bool = True) -> Answer:
    """Run an answer to its end, printing its text as it comes; Ctrl-C ends it.

    Raises:
        BackendError: the engine failed; what was printed is followed by a line break.
    """
    from edgekv.chat.session import Dropped

    texts: list[str] = []
    last: Step | None = None
    to_terminal = sys.stdout.isatty()
    with interrupting(session.generator):
        try:
            for event in events:
                if isinstance(event, Dropped):
                    notice(f"the context is full: forgot the oldest {_count(event.n_turns, 'turn')}")
                    continue
                last = event
                texts.append(event.text)
                if visible and event.text:
                    shown = (
                        _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", event.text) if to_terminal else event.text
                    )
                    click.echo(shown, nl=False)
                    sys.stdout.flush()
        finally:
            if visible:
                click.echo()
    assert last is not None
    assert last.finish is not None
    if last.finish == "context":
        notice("the context is full, and nothing is left to forget: start with a larger --ctx-size")
    return Answer("".join(texts), last.finish, last.timings)


@contextlib.contextmanager
def interrupting(generator: Generator) -> Iterator[None]:
    """While the block runs, Ctrl-C ends the generation and nothing else."""

    def stop(number: int, frame: FrameType | None) -> None:
        generator.interrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def notice(text: str) -> None:
    """A line about the conversation, apart from it: on standard error, dim where that shows."""
    click.secho(f"[{text}]", err=True, dim=True)


def figures(timings: Timings, engine: IsolatedBackend) -> dict[str, float | int | None]:
    """Figures of an answer under the names of the JSON output."""
    from edgekv.host.proc import peak_rss_nbytes

    return {
        "n_reused": timings.n_reused,
        "n_prefilled": timings.n_prefilled,
        "n_generated": timings.n_generated,
        "ttft_s": round(timings.ttft_s, 6),
        "prefill_tps": round(timings.prefill_tps, 3),
        "decode_tps": round(timings.decode_tps, 3),
        "n_ctx": engine.n_ctx,
        "cache_nbytes": engine.cache_nbytes(),
        "engine_peak_rss_nbytes": engine.peak_rss_nbytes(),
        "chat_peak_rss_nbytes": peak_rss_nbytes(os.getpid()),
    }


def stats_line(timings: Timings, engine: IsolatedBackend) -> str:
    """The same figures for people."""
    values = figures(timings, engine)
    rss = [
        f"{name} {nbytes / 1e6:.0f} MB"
        for name, nbytes in (
            ("engine", values["engine_peak_rss_nbytes"]),
            ("chat", values["chat_peak_rss_nbytes"]),
        )
        if nbytes is not None
    ]
    reused = f" (+{timings.n_reused} in cache)" if timings.n_reused else ""
    return click.style(
        f"[first token {timings.ttft_s:.2f} s | prefill {timings.n_prefilled} tokens{reused} "
        f"{timings.prefill_tps:.1f} tokens/s | decode {timings.n_generated} tokens {timings.decode_tps:.1f} "
        f"tokens/s | cache {engine.cache_nbytes() / 1e6:.1f} MB for {engine.n_ctx} tokens"
        + (f" | peak RSS {', '.join(rss)}" if rss else "")
        + "]",
        dim=True,
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}s" if n != 1 else noun
