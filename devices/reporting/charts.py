"""Charts of a comparison page: decode speed, memory, and where the time of a token goes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgekv.backends.llama_cpp.footprint import CELLS
from edgekv.devices.boards.profile import load_boards
from edgekv.devices.reporting.report import BenchRun, Point
from edgekv.devices.reporting.svg import Bar, Dot, Limit, Line, bar_chart, line_chart
from edgekv.devices.reporting.tables import Entry, machine_label, machine_name, run_label

MIB = 2**20
TIME_PARTS = {  # by CSS class
    "weights": "reading the weights at the measured bandwidth",
    "attention": "attention over the cache",
    "rest": "all else",
}
MIN_CONTEXT = 8192  # how far to the right the memory chart reaches at least


def provenance(entry: Entry) -> str:
    """Where a figure of this run comes from, in one line."""
    report, settings = entry.source.report, entry.source.report.settings
    plural = "" if settings.threads == 1 else "s"
    threads = f", {settings.threads} thread{plural}" if settings.threads else ""
    where = f"{report.provenance} on {machine_name(report.machine)}{threads}"
    return f"{where}, {report.created[:10]}, {entry.source.name}"


def speed_chart(entries: Sequence[Entry]) -> str | None:
    """Decode speed against depth; None if no run has any."""
    lines = []
    for i, entry in enumerate(entries):
        dots = []
        for point in sorted(entry.run.points, key=lambda point: point.depth):
            if stat := point.decode_tps:
                samples = f"median of {len(stat.samples)}, " if stat.samples else ""
                tip = (
                    f"{entry.name}: {stat.median:.1f} tokens/s at depth {point.depth:,} "
                    f"({samples}{stat.low:.1f} to {stat.high:.1f}); {provenance(entry)}"
                )
                dots.append(Dot(point.depth, stat.median, stat.low, stat.high, tip))
        if dots:
            lines.append(Line(tuple(dots), entry.source.report.provenance, i))
    if not lines:
        return None
    title = "Decode tokens per second against tokens in the cache"
    return line_chart(title, lines, "tokens in the cache", "tokens/s", lambda value: f"{value:,g}")


def memory_chart(entries: Sequence[Entry]) -> str | None:
    """Memory against context: the measured peak as a dot, other contexts by arithmetic, boards as limits."""
    known = [
        (i, entry) for i, entry in enumerate(entries) if entry.run.memory and entry.run.cache.nbytes_per_token
    ]
    if not known:
        return None
    longest = max(MIN_CONTEXT, *(entry.run.cache.n_ctx or 0 for _, entry in known))
    lines = []
    for i, entry in known:
        contexts = sorted({CELLS, longest})
        drawn = [_memory_dot(entry, context, "calculated from the measured peak") for context in contexts]
        lines.append(Line(tuple(drawn), "projected", i))
        if entry.run.cache.n_ctx:
            kind = entry.source.report.provenance
            dot = _memory_dot(entry, entry.run.cache.n_ctx, f"{kind} peak")
            lines.append(Line((dot,), kind, i))
    highest = max(dot.y for line in lines for dot in line.dots)
    title = "Memory in MiB against context, with what boards have free"
    return line_chart(title, lines, "context", "MiB", lambda value: f"{value:,.0f}", board_limits(highest))


def board_limits(highest_mib: float) -> tuple[Limit, ...]:
    """What CPU boards leave to programs, up to the first above `highest_mib`; equal ones share a line."""
    free: dict[int, list[str]] = {}
    for board in load_boards().values():
        for ram in () if board.is_gpu else board.ram_mib:
            size = f" {ram // 1024} GB" if len(board.ram_mib) > 1 else ""
            free.setdefault(ram - board.os_mib, []).append(board.name.replace("Raspberry Pi", "Pi") + size)
    found = []
    for limit in sorted(free):
        names = free[limit]
        found.append(Limit(limit, " / ".join(names[:2]) + (" ..." if len(names) > 2 else "")))
        if limit > highest_mib:
            break
    return tuple(found[-4:])


def time_chart(entries: Sequence[Entry]) -> str | None:
    """Where the time of a decoded token goes: weights at the measured bandwidth, growth with depth, the rest."""
    bars = []
    for i, entry in enumerate(entries):
        base, where = empty_cache_s(entry.run), machine_label(entry.source.report.machine)
        for point in entry.run.points:
            if times := time_parts(entry.run, point, base):
                name = f"{where}: {run_label(entry.run)} at {point.depth:,}"
                parts = tuple(
                    (ms, style, f"{name}: {ms:.2f} ms {words}; {provenance(entry)}")
                    for ms, (style, words) in zip(times, TIME_PARTS.items(), strict=True)
                )
                bars.append(Bar(name, parts, entry.source.report.provenance, i))
    if not bars:
        return None
    title = "Where the time of a decoded token goes"
    return bar_chart(title, bars, "ms per token", lambda value: f"{value:.3g}")


def empty_cache_s(run: BenchRun) -> float | None:
    """Seconds of a token with an empty cache: measured at depth 0, or the line through all depths there."""
    speeds = [(point.depth, 1 / point.decode_tps.median) for point in run.points if point.decode_tps]
    if not speeds:
        return None
    if speeds[0][0] == 0:
        return speeds[0][1]
    if len(speeds) < 2:
        return None
    return max(0.0, statistics.linear_regression(*zip(*speeds, strict=True)).intercept)


def time_parts(run: BenchRun, point: Point, base_s: float | None) -> tuple[float, float, float] | None:
    """Milliseconds of weights, attention and the rest; None where bandwidth or speed is not known."""
    if not (point.decode_tps and run.bandwidth_gb_s and run.model.read_nbytes and base_s is not None):
        return None
    total_ms = 1000 / point.decode_tps.median
    attention_ms = min(total_ms, max(0.0, total_ms - base_s * 1000))
    weights_ms = min(run.model.read_nbytes / run.bandwidth_gb_s / 1e6, total_ms - attention_ms)
    return weights_ms, attention_ms, total_ms - attention_ms - weights_ms


def _held_nbytes(run: BenchRun, context: int) -> int:
    """The cache's bytes at another context: those of layers with a window stop growing where they did."""
    per_token, windowed = run.cache.nbytes_per_token, run.cache.window_nbytes_per_token or 0
    assert per_token is not None
    cells = _cells(context)
    nbytes = per_token * cells
    if windowed and run.cache.n_ctx and run.memory and run.memory.cache_nbytes:
        most = run.memory.cache_nbytes - (per_token - windowed) * _cells(run.cache.n_ctx)
        nbytes -= max(0, windowed * cells - most)
    return nbytes


def _cells(context: int) -> int:
    return -(-context // CELLS) * CELLS


def _memory_dot(entry: Entry, context: int, how: str) -> Dot:
    run = entry.run
    assert run.memory is not None
    held = run.memory.cache_nbytes or 0
    mib = (run.memory.peak_rss_nbytes - held + _held_nbytes(run, context)) / MIB
    tip = f"{entry.name}: {mib:,.0f} MiB at a context of {context:,}, {how}; {provenance(entry)}"
    return Dot(context, mib, mib, mib, tip)
