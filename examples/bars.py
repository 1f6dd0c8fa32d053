"""A few figures as bars: a PNG where matplotlib is installed, else lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#56b4e9")  # told apart by colour-blind readers too
TEXT_WIDTH = 40


@dataclass(frozen=True)
class Chart:
    """One figure of several candidates by their names; `title` has its unit."""

    title: str
    values: Mapping[str, float]


def draw(charts: Sequence[Chart], title: str, path: Path) -> bool:
    """Write a PNG of one panel per chart and one colour per name; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return False
    names = dict.fromkeys(name for chart in charts for name in chart.values)
    colours = dict(zip(names, COLOURS, strict=False))
    figure = Figure(figsize=(3 * len(charts), 3.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        bars = axes.bar(list(chart.values), chart.values.values(), color=[colours[n] for n in chart.values])
        axes.bar_label(bars, [short(value) for value in chart.values.values()], fontsize=9)
        axes.set_title(chart.title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(charts), frameon=False, fontsize=9)
    figure.savefig(path)
    return True


def as_text(charts: Sequence[Chart]) -> str:
    """The same as bars of characters, the longest of each chart TEXT_WIDTH wide."""
    width = max(len(name) for chart in charts for name in chart.values)
    lines = []
    for chart in charts:
        lines.append(chart.title)
        most = max(chart.values.values()) or 1.0
        for name, value in chart.values.items():
            lines.append(f"  {name:{width}}  {'█' * round(value / most * TEXT_WIDTH)} {short(value)}")
    return "\n".join(lines)


def short(value: float) -> str:
    """About two significant figures below 10, whole numbers from there on."""
    digits = sum(value < limit for limit in (10, 1, 0.1))
    return f"{value:,.{digits}f}"
