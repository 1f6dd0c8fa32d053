"""Picture of a sweep: KL against cache bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.devices.reporting.picture import write_svg
from edgekv.evaluate.sweep import ORIGINAL, SweepPoint, SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KL_FLOOR = 1e-6  # nats: below it, and below zero, is the estimate's own noise; such points stand on the floor


def plot_sweep(report: SweepReport, path: Path) -> None:
    """Write the picture as SVG, the same bytes for the same report.

    Raises:
        BackendError: matplotlib is not installed.
    """
    write_svg(lambda: sweep_figure(report), path)


def sweep_figure(report: SweepReport) -> Figure:
    """Both axes logarithmic; the model's own caches joined, others dots by conversion; dominated ones hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    own = [point for point in report.points if point.own_cache]
    _series(axes, own, f"{ORIGINAL}, its own caches", "black", "s", "-")
    names = dict.fromkeys(point.name for point in report.points if not point.own_cache)
    for i, name in enumerate(names):
        _series(axes, [p for p in report.points if p.name == name], name, f"C{i % 10}", "o", "")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="cache bytes per token, all layers",
        ylabel="KL(original || candidate), nats per token",
        title=f"{report.reference.file}, {report.text}, {report.tokens_scored:,} tokens; hollow: dominated",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    return figure


def _series(axes: Axes, points: Sequence[SweepPoint], label: str, color: str, marker: str, line: str) -> None:
    """One model's points, each with its cache type beside it."""
    x = [point.cache_nbytes_per_token for point in points]
    y = [max(point.kl, KL_FLOOR) for point in points]
    axes.plot(x, y, linestyle=line, color=color, linewidth=1)
    for solid in (True, False):
        at = [i for i, point in enumerate(points) if (point.dominated_by is None) == solid]
        axes.scatter(
            [x[i] for i in at],
            [y[i] for i in at],
            marker=marker,
            edgecolors=color,
            facecolors=color if solid else "none",
            zorder=3,
        )
    axes.scatter([], [], marker=marker, color=color, label=label)  # the legend's dot is solid either way
    for point, left, top in zip(points, x, y, strict=True):
        axes.annotate(point.cache_type, (left, top), xytext=(5, 4), textcoords="offset points", fontsize=8)
