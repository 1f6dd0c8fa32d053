"""Output of an answer while it is generated, and its figures afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import click

from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.chat.generate import Forgotten, Generator, Step
from edgekv.chat.session import ChatSession, Dropped, Event, more_context
from edgekv.host.load import Load, LoadMeter
from edgekv.host.proc import peak_rss_nbytes

# Escape sequences in a model's text could move the cursor, set the title or write the clipboard.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Answer:
    """An answer's last step, with all the text, and what else used the CPUs meanwhile, where that is known."""

    step: Step
    load: Load | None


def show_answer(
    session: ChatSession, engine: IsolatedBackend, events: Iterator[Event], *, visible: bool = True
) -> Answer:
    """Print an answer as it comes, until its end or Ctrl-C.

    Raises:
        BackendError: the engine failed; the text printed so far ends with a line break.
    """
    meter = LoadMeter([engine.pid])
    texts: list[str] = []
    last: Step | None = None
    to_terminal = sys.stdout.isatty()
    with interrupting(session.generator):
        try:
            for event in events:
                if not isinstance(event, Step):
                    notice(_what_was_lost(event))
                    continue
                last = event
                texts.append(event.text)
                if visible and event.text:
                    safe = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", event.text)
                    click.echo(safe if to_terminal else event.text, nl=False)
                    sys.stdout.flush()
        finally:
            if visible and last is not None:
                click.echo()
    assert last is not None
    if last.finish == "context":
        advice = more_context(session.generator.backend)
        notice(f"the context is full and no older turn is left to drop; {advice}")
    return Answer(replace(last, text="".join(texts)), meter.read())


def _what_was_lost(event: Dropped | Forgotten) -> str:
    if isinstance(event, Dropped):
        turns = "turn" if event.n_turns == 1 else f"{event.n_turns} turns"
        return f"the context is full: forgot the oldest {turns}"
    return f"a cache with sliding windows cannot go back that far: all {event.n_tokens} tokens are read again"


@contextlib.contextmanager
def interrupting(generator: Generator) -> Iterator[None]:
    """While the block runs, Ctrl-C ends the generation and nothing else."""
    before = signal.signal(signal.SIGINT, lambda number, frame: generator.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def notice(text: str) -> None:
    """Print a line about the conversation to standard error, in dim letters."""
    click.secho(f"[{text}]", err=True, dim=True)


def figures(answer: Answer, engine: IsolatedBackend) -> dict[str, float | int | str | None]:
    """Figures of an answer under the names of the JSON output."""
    timings, load = answer.step.timings, answer.load
    return {
        "n_reused": timings.n_reused,
        "n_prefilled": timings.n_prefilled,
        "n_forgotten": timings.n_forgotten,
        "n_generated": timings.n_generated,
        "ttft_s": round(timings.ttft_s, 6),
        "prefill_tps": round(timings.prefill_tps, 3),
        "decode_tps": round(timings.decode_tps, 3),
        "n_ctx": engine.n_ctx,
        "kernel": engine.kernel,
        "cache_nbytes": engine.cache_nbytes(),
        "engine_peak_rss_nbytes": engine.peak_rss_nbytes(),
        "chat_peak_rss_nbytes": peak_rss_nbytes(os.getpid()),
        "others_cpu_share": None if load is None else round(load.others, 3),
        "stolen_cpu_share": None if load is None else round(load.stolen, 3),
    }


def stats_line(answer: Answer, engine: IsolatedBackend) -> str:
    """The same figures for people, in one line."""
    timings, load = answer.step.timings, answer.load
    peaks = {"engine": engine.peak_rss_nbytes(), "chat": peak_rss_nbytes(os.getpid())}
    rss = [f"{name} {nbytes / 1e6:.0f} MB" for name, nbytes in peaks.items() if nbytes is not None]
    reused = f" (+{timings.n_reused} in cache)" if timings.n_reused else ""
    again = f" ({timings.n_forgotten} again)" if timings.n_forgotten else ""
    kernel = " | EdgeKV kernel" if engine.kernel == "edgekv" else ""
    return click.style(
        f"[first token {timings.ttft_s:.2f} s | prefill {timings.n_prefilled} tokens{reused}{again} "
        f"{timings.prefill_tps:.1f} tokens/s | decode {timings.n_generated} tokens {timings.decode_tps:.1f} "
        f"tokens/s | cache {engine.cache_nbytes() / 1e6:.1f} MB for {engine.n_cells} tokens"
        + kernel
        + (f" | peak RSS {', '.join(rss)}" if rss else "")
        + (f" | not alone: {load.words()}" if load and load.busy else "")
        + "]",
        dim=True,
    )
