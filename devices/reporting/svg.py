"""SVG charts as text: no script, no network, colours from the page's style sheet.

The viewBox is about as wide as a phone, so that the text stays readable there; a page shows several side by
side on a larger screen. Everything that comes from a report is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 16, 44
BAR_HEIGHT = 38
N_COLOURS = 8
MAX_NAME = 52  # characters that fit across a chart


@dataclass(frozen=True)
class Dot:
    """A point with an interval around y; `tip` shows under a pointer."""

    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Line:
    """A run's line. `style` is a CSS class: measured, emulated or projected."""

    dots: tuple[Dot, ...]
    style: str
    run: int  # its number, which gives its colour, and the class by which a page hides it


@dataclass(frozen=True)
class Limit:
    """A horizontal line across a chart."""

    y: float
    name: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of parts, each (length, CSS class, tip)."""

    name: str
    parts: tuple[tuple[float, str, str], ...]
    style: str
    run: int


Format = Callable[[float], str]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    y_format: Format,
    limits: Sequence[Limit] = (),
) -> str:
    """Lines over a common linear x axis; both axes start at zero."""
    x_ticks = ticks(max((dot.x for line in lines for dot in line.dots), default=0.0))
    highest = [dot.high for line in lines for dot in line.dots] + [limit.y for limit in limits]
    y_ticks = ticks(max(highest, default=0.0))
    to_x = _scale(x_ticks[-1], LEFT, WIDTH - RIGHT)
    to_y = _scale(y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [_grid(x_ticks, y_ticks, to_x, to_y, y_format)]
    body += [_limit(limit, to_y) for limit in limits]
    body += [_line(line, to_x, to_y) for line in lines]
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "middle"))
    body.append(_text(LEFT, TOP - 3, y_name, "start"))
    return _svg(title, HEIGHT, body)


def bar_chart(title: str, bars: Sequence[Bar], x_name: str, x_format: Format) -> str:
    """Stacked horizontal bars, each under its name, on one x axis; an image each, so that a page can hide any."""
    x_ticks = ticks(max((sum(length for length, _, _ in bar.parts) for bar in bars), default=0.0))
    to_x = _scale(x_ticks[-1], 4, WIDTH - 24)
    drawn = []
    for bar in bars:
        body = [_vertical(to_x(value), 0, BAR_HEIGHT) for value in x_ticks]
        body.append(_text(4, 15, shortened(bar.name), "start"))
        start = 0.0
        for length, style, tip in bar.parts:
            width = to_x(start + length) - to_x(start)
            body.append(
                f'<rect class="{style} {bar.style}" x="{to_x(start):.1f}" y="18" width="{width:.1f}" '
                f'height="14"><title>{escape(tip)}</title></rect>'
            )
            start += length
        drawn.append(_svg(f"{title}: {bar.name}", BAR_HEIGHT, body, f"run{bar.run}"))
    axis = [_text(to_x(value), 14, x_format(value), "middle") for value in x_ticks]
    return "".join(drawn) + _svg(x_name, 38, [*axis, _text(WIDTH / 2, 32, x_name, "middle")])


def _vertical(x: float, top: float, bottom: float) -> str:
    return f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{bottom:.0f}"/>'


def shortened(name: str) -> str:
    """A name that fits: part of the file's name goes, since the end holds cache type and depth."""
    return name if len(name) <= MAX_NAME else f"{name[:12]}...{name[-(MAX_NAME - 15) :]}"


def ticks(highest: float, count: int = 5) -> list[float]:
    """Round values from 0 past `highest`: steps of 1, 2 or 5 times a power of ten."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _scale(highest: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * value / highest


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    y_format: Format,
) -> str:
    parts = []
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 5, y + 4, y_format(value), "end"))
    parts += [_text(to_x(value), HEIGHT - BOTTOM + 15, f"{value:,.0f}", "middle") for value in x_ticks]
    return "".join(parts)


def _limit(limit: Limit, to_y: Callable[[float], float]) -> str:
    y = to_y(limit.y)
    line = f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT + 4, y - 3, limit.name, "start")


def _line(line: Line, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    style = f"{line.style} c{line.run % N_COLOURS} run{line.run}"
    path = " ".join(f"{to_x(dot.x):.1f},{to_y(dot.y):.1f}" for dot in line.dots)
    parts = [f'<polyline class="line {style}" points="{path}"/>'] if len(line.dots) > 1 else []
    for dot in line.dots:
        x = to_x(dot.x)
        if dot.high > dot.low:
            span = f'y1="{to_y(dot.low):.1f}" y2="{to_y(dot.high):.1f}"'
            parts.append(f'<line class="span {style}" x1="{x:.1f}" x2="{x:.1f}" {span}/>')
        parts.append(
            f'<circle class="dot {style}" cx="{x:.1f}" cy="{to_y(dot.y):.1f}" r="3.5">'
            f"<title>{escape(dot.tip)}</title></circle>"
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, body: Sequence[str], style: str = "") -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )
