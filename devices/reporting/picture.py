"""Picture of a comparison for a README, as SVG: decode speed and peak memory of every run.

One line per run, under its machine: decode speed with an empty cache and at its deepest depth on a logarithmic axis,
since a Pi and a GPU lie a factor of a hundred apart, and peak memory. An emulated run has no speed: its times are the
emulator's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekv.devices.reporting.tables import Entry, Source, entries
from edgekv.errors import BackendError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
PLAIN, LATENT = "#d55e00", "#009e73"
# By provenance: its words, and how lines and bars of it look.
LOOKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "measured": ("measured", {"linestyle": "-"}, {}),
    "emulated": ("emulated: memory counts, times do not", {}, {"alpha": 0.6, "hatch": "////"}),
    "projected": ("projected", {"linestyle": ":"}, {"alpha": 0.4, "linestyle": ":", "edgecolor": "0"}),
}


def write_svg(draw: Callable[[], Figure], path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BackendError("the picture needs matplotlib: pip install 'edgekv[plot]'") from error
    with matplotlib.rc_context({"svg.hashsalt": "edgekv", "svg.fonttype": "none"}):
        draw().savefig(path, format="svg", metadata={"Date": None})


def comparison_figure(sources: Sequence[Source]) -> Figure:
    """Speeds on the left, memory on the right; machines that were measured first, else in the reports' order.

    Raises:
        InputError: no run has anything to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = list(_lines(sources))
    if not lines:
        raise InputError("none of these reports has a speed or a memory to draw")
    figure = Figure(figsize=(10, 1.1 + 0.22 * len(lines)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, (name, row) in enumerate(lines):
        left, weight = (-195, "normal") if row else (-210, "bold")
        _text(speed, name, 0, y, left, size=10, weight=weight, xycoords=("axes fraction", "data"))
        if row:
            _draw_speed(speed, y, row)
            _draw_memory(memory, y, row)
    speed.set(xscale="log", xmargin=0.2, ylim=(len(lines) - 0.4, -0.6), yticks=[])
    memory.set(xmargin=0.2)
    speed.set_title("decode, tokens/s: at depth (hollow), in an empty cache", fontsize=10)
    memory.set_title("peak memory with the card's, MiB", fontsize=10)
    for axes in (speed, memory):
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[:].set_visible(False)
    handles = [Patch(color=PLAIN, label="original"), Patch(color=LATENT, label="with a latent (MLA)")]
    handles += [Patch(facecolor="0.3", label=words, **bar) for words, _, bar in LOOKS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _lines(sources: Sequence[Source]) -> Iterator[tuple[str, Entry | None]]:
    """A machine's name, then its runs, the original before those with a latent; then the next machine's."""
    machines: dict[str, list[Entry]] = {}
    for row in entries(sources):
        if _speeds(row) or row.run.memory:
            machines.setdefault(_machine(row), []).append(row)
    kinds = list(LOOKS)
    for machine, rows in sorted(machines.items(), key=lambda item: kinds.index(_kind(item[1][0]))):
        yield machine, None
        for row in sorted(rows, key=lambda row: row.run.model.attention == "MLA"):
            engine = "" if row.run.engine in ("llama.cpp", "projection") else f"{row.run.engine}, "
            yield f"{Path(row.run.model.file).stem}, {engine}{row.run.cache.type}", row


def _kind(row: Entry) -> str:
    return row.source.report.provenance


def _machine(row: Entry) -> str:
    machine, kind = row.source.report.machine, _kind(row)
    name = machine.card or machine.board
    return name if name.startswith(kind) else f"{name}, {kind}"


def _speeds(row: Entry) -> list[tuple[int, float]]:
    """(depth, tokens/s) of the deepest and the shallowest point; none for an emulated run."""
    if _kind(row) == "emulated":
        return []
    known = sorted((point.depth, point.decode_tps.median) for point in row.run.points if point.decode_tps)
    return [known[-1], known[0]] if len(known) > 1 else known


def _draw_speed(axes: Axes, y: int, row: Entry) -> None:
    colour, (_, line, _) = _colour(row), LOOKS[_kind(row)]
    speeds = _speeds(row)
    axes.plot([tps for _, tps in speeds], [y] * len(speeds), color=colour, **line)
    for depth, tps in speeds[:-1]:
        axes.plot(tps, y, "o", color=colour, markerfacecolor="white")
        _text(axes, f"{tps:.3g} at {depth:,}", tps, y, -7, ha="right")
    for _, tps in speeds[-1:]:
        axes.plot(tps, y, "o", color=colour)
        _text(axes, f"{tps:.3g}", tps, y, 7)


def _draw_memory(axes: Axes, y: int, row: Entry) -> None:
    if memory := row.run.memory:
        mib = (memory.peak_rss_nbytes + (memory.card_nbytes or 0)) / MIB
        _, _, bar = LOOKS[_kind(row)]
        axes.barh(y, mib, color=_colour(row), **bar)
        _text(axes, f"{mib:,.0f}", mib, y, 5)


def _colour(row: Entry) -> str:
    return LATENT if row.run.model.attention == "MLA" else PLAIN


def _text(axes: Axes, text: str, x: float, y: float, shift: float, size: float = 9, **how: Any) -> None:
    """A text `shift` points right of a place, in the middle of its line."""
    how |= {"va": "center", "fontsize": size, "parse_math": False}
    axes.annotate(text, (x, y), (shift, 0), textcoords="offset points", **how)
