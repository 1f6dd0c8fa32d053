"""Pictures of what a cache loses: KL against bytes per token, and scores against bytes per context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.devices.reporting.picture import write_svg
from edgekv.evaluate.sweep import ORIGINAL, SweepPoint, SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv"  # by cache type
LINES = ("-", "--", "-.", ":")  # by policy
KL_FLOOR = 1e-6  # nats: below it, and below zero, is the estimate's own noise; such points stand on the floor


@dataclass(frozen=True)
class ContextPoint:
    """A model, its cache type and the share of the rows that a policy keeps: bytes, and a score of 0 to 1."""

    model: str
    cache_type: str
    policy: str | None  # None: all rows stay
    nbytes: float  # of the whole context
    score: float
    score_se: float


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


def plot_contexts(points: Sequence[ContextPoint], title: str, path: Path) -> None:
    """Write the picture of scores against bytes per context as SVG, the same bytes for the same points.

    Raises:
        BackendError: matplotlib is not installed.
    """
    write_svg(lambda: contexts_figure(points, title), path)


def contexts_figure(points: Sequence[ContextPoint], title: str) -> Figure:
    """A colour per model, a mark per cache type; a line per policy from all rows, marked in black, to the fewest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(point.model for point in points))
    types = list(dict.fromkeys(point.cache_type for point in points))
    policies = list(dict.fromkeys(point.policy for point in points if point.policy))
    for model in models:
        for cache_type in types:
            here = [point for point in points if (point.model, point.cache_type) == (model, cache_type)]
            whole = [point for point in here if point.policy is None]
            color, marker = f"C{models.index(model) % 10}", MARKERS[types.index(cache_type) % len(MARKERS)]
            for policy in policies:
                kept = sorted((p for p in here if p.policy == policy), key=lambda p: -p.nbytes)
                style = LINES[policies.index(policy) % len(LINES)]
                if kept:
                    _line(axes, [*whole, *kept], color, marker, style)
            where = [p.nbytes / 1e6 for p in whole], [100 * p.score for p in whole]
            axes.scatter(*where, s=64, c="black", marker=marker, zorder=3)
            if here:
                axes.scatter([], [], color=color, marker=marker, label=f"{model}, {cache_type}")
    for policy, style in zip(policies, LINES, strict=False):
        axes.plot([], [], color="grey", linestyle=style, label=policy)
    axes.set(
        xscale="log", xlabel="cache of the context, MB", ylabel="mean score, %; black: all rows", title=title
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    return figure


def _line(axes: Axes, points: Sequence[ContextPoint], color: str, marker: str, style: str) -> None:
    axes.errorbar(
        [point.nbytes / 1e6 for point in points],
        [100 * point.score for point in points],
        [100 * point.score_se for point in points],
        color=color,
        marker=marker,
        linestyle=style,
        linewidth=1,
        capsize=2,
    )
