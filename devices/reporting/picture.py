"""All runs of a comparison as one SVG, for a README: how fast each machine decodes, and in how much memory.

A line for each run, under its machine: decode speed with an empty cache and at its deepest depth on a logarithmic axis,
since a Pi and a GPU lie a factor of a hundred apart, and peak memory. An emulated run has no speed: its times are the
emulator's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from edgekv.devices.reporting.page import STYLE
from edgekv.devices.reporting.tables import Entry, Source, entries
from edgekv.errors import InputError

WIDTH, TOP, TITLE, LINE, BOTTOM = 900, 44, 24, 20, 62
LABEL, SPEED, MEMORY = 24, (300, 590), (660, 830)  # where each column begins, and ends
MIB = 2**20
KEY = (
    ("measured", "measured"),
    ("emulated", "emulated: memory counts, times do not"),
    ("projected", "projected"),
)


def picture(sources: Sequence[Source]) -> str:
    """The SVG as text; runs of one machine stand together, in the order of the reports.

    Raises:
        InputError: no run has anything to draw.
    """
    machines: dict[str, list[Entry]] = {}
    for row in entries(sources):
        if _speeds(row) or row.run.memory:
            machines.setdefault(_machine(row), []).append(row)
    for group in machines.values():
        group.sort(key=lambda row: row.run.model.attention == "MLA")  # the original first
    rows = [row for group in machines.values() for row in group]
    if not rows:
        raise InputError("none of these reports has a speed or a memory to draw")
    bottom = TOP + TITLE * len(machines) + LINE * len(rows)
    tens = _tens([speed for row in rows for _, speed in _speeds(row)])
    to_x = _log_scale(tens)
    longest = max(_mib(row) for row in rows)
    parts = [
        f'<rect width="{WIDTH}" height="{bottom + BOTTOM}" fill="var(--bg)"/>',
        _text(SPEED[0], 18, "decode, tokens/s: at depth (hollow), in an empty cache"),
        _text(MEMORY[0], 18, "peak memory with the card's, MiB"),
        *(_tick(to_x(value), f"{value:,g}", bottom) for value in tens),
    ]
    y = TOP
    for machine, group in machines.items():
        parts.append(f'<text x="8" y="{y + 16}" font-weight="600">{escape(machine)}</text>')
        y += TITLE
        for row in group:
            parts.append(_row(row, y + LINE / 2, to_x, longest))
            y += LINE
    parts.append(_key(bottom + 44))
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" '
        f'font-family="sans-serif" aria-label="Decode speed and peak memory by machine"><style>{style}</style>'
        + "".join(parts)
        + "</svg>\n"
    )


def _machine(row: Entry) -> str:
    machine, kind = row.source.report.machine, row.source.report.provenance
    name = machine.card or machine.board
    return name if name.startswith(kind) else f"{name}, {kind}"


def _name(row: Entry) -> str:
    run = row.run
    engine = "" if run.engine in ("llama.cpp", "projection") else f"{run.engine}, "
    return f"{Path(run.model.file).stem}, {engine}{run.cache.type}"


def _speeds(row: Entry) -> list[tuple[int, float]]:
    """(depth, tokens/s) of the shallowest and the deepest point; none for an emulated run."""
    if row.source.report.provenance == "emulated":
        return []
    known = sorted((point.depth, point.decode_tps.median) for point in row.run.points if point.decode_tps)
    return [known[-1], known[0]] if len(known) > 1 else known


def _mib(row: Entry) -> float:
    """Peak of the process and what it took of a card."""
    memory = row.run.memory
    return (memory.peak_rss_nbytes + (memory.card_nbytes or 0)) / MIB if memory else 0.0


def _tens(speeds: Sequence[float]) -> list[float]:
    """1, 3, 10, 30, ... from below the slowest to above the fastest."""
    low, high = (min(speeds), max(speeds)) if speeds else (1.0, 10.0)
    steps = [factor * 10.0**power for power in range(-3, 7) for factor in (1, 3)]
    first = max(i for i, step in enumerate(steps) if step <= max(low, steps[0]))
    last = min(i for i, step in enumerate(steps) if step >= min(high, steps[-1]))
    return steps[first : max(last, first + 1) + 1]


def _log_scale(tens: Sequence[float]) -> Callable[[float], float]:
    low, high = math.log(tens[0]), math.log(tens[-1])
    return lambda value: SPEED[0] + (SPEED[1] - SPEED[0]) * (math.log(value) - low) / (high - low)


def _row(row: Entry, y: float, to_x: Callable[[float], float], longest: float) -> str:
    # One colour for models with a latent, one for those without.
    colour = "c2" if row.run.model.attention == "MLA" else "c1"
    style = f"{row.source.report.provenance} {colour}"
    parts = [_text(LABEL, y + 5, _name(row))]
    speeds = _speeds(row)
    if len(speeds) == 2:
        (depth, deep), (_, shallow) = speeds
        parts.append(
            f'<line class="line {style}" x1="{to_x(deep):.1f}" x2="{to_x(shallow):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(
            f'<circle class="dot {style}" style="fill:var(--bg)" cx="{to_x(deep):.1f}" cy="{y}" r="4"/>'
            + _text(to_x(deep) - 8, y + 5, f"{deep:.3g} at {depth:,}", "end")
        )
    if speeds:
        x = to_x(speeds[-1][1])
        parts.append(f'<circle class="dot {style}" style="fill:currentColor" cx="{x:.1f}" cy="{y}" r="4"/>')
        parts.append(_text(x + 8, y + 5, f"{speeds[-1][1]:.3g}"))
    if row.run.memory:
        width = (MEMORY[1] - MEMORY[0]) * _mib(row) / longest
        parts.append(
            f'<rect class="{style}" fill="currentColor" x="{MEMORY[0]}" y="{y - 7}" width="{width:.1f}" '
            'height="14"/>'
        )
        parts.append(_text(MEMORY[0] + width + 6, y + 5, f"{_mib(row):,.0f}"))
    return "".join(parts)


def _tick(x: float, name: str, bottom: float) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{bottom + 4}"/>'
    return line + _text(x, bottom + 18, name, "middle")


def _key(y: float) -> str:
    parts, x = [], LABEL
    for colour, name in (("c1", "original"), ("c2", "with a latent (MLA)")):
        parts.append(
            f'<rect class="{colour}" fill="currentColor" x="{x}" y="{y - 11}" width="12" height="12"/>'
        )
        parts.append(_text(x + 18, y, name))
        x += 40 + 7 * len(name)
    for kind, name in KEY:
        parts.append(
            f'<rect class="{kind} c7" fill="currentColor" x="{x}" y="{y - 11}" width="22" height="12"/>'
        )
        parts.append(_text(x + 28, y, name))
        x += 50 + 7 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
