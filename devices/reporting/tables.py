"""Tables of reports side by side, and warnings about the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.devices.reporting.report import BenchRun, Machine, Point, Report, Stat
from edgekv.devices.reporting.text_table import UNKNOWN, Table, mebibytes, seconds, whole, without_empty

NOISY_SPREAD = 0.10  # (high - low) / median from which a figure is called noisy


@dataclass(frozen=True)
class Source:
    """One report and the name it goes by (its file, or "this run")."""

    name: str
    report: Report


@dataclass(frozen=True)
class Entry:
    """One run with the report that holds it, under a name unique in the comparison."""

    name: str
    run: BenchRun
    source: Source


def entries(sources: Sequence[Source]) -> tuple[Entry, ...]:
    """Every run of every report; a label that repeats gets its report's name."""
    labels = [run.label for source in sources for run in source.report.runs]
    found: list[Entry] = []
    for source in sources:
        for run in source.report.runs:
            name = run.label if labels.count(run.label) == 1 else f"{run.label} ({source.name})"
            taken = sum(entry.name.split(" #")[0] == name for entry in found)
            found.append(Entry(f"{name} #{taken + 1}" if taken else name, run, source))
    return tuple(found)


def tables(sources: Sequence[Source]) -> tuple[Table, ...]:
    """Speed, memory and provenance."""
    rows = entries(sources)
    return (speed_table(rows), memory_table(rows), provenance_table(rows))


def speed_table(rows: Sequence[Entry]) -> Table:
    """One row per run and depth, grouped by depth; `vs` is against the first run of the group."""
    lines = []
    for depth in sorted({point.depth for row in rows for point in row.run.points}):
        base: float | None = None
        for row in rows:
            for point in (p for p in row.run.points if p.depth == depth):
                speed = point.decode_tps.median if point.decode_tps else None
                base = base if base is not None else speed
                against = f"x{speed / base:.2f}" if speed and base else UNKNOWN
                lines.append(_speed_line(row, point, against))
    return without_empty(Table.of("Speed", "run", lines))


def _speed_line(row: Entry, point: Point, against: str) -> dict[str, str]:
    return {
        "run": row.name,
        "depth": f"{point.depth:,}",
        "decode t/s": rate(point.decode_tps),
        "spread": spread(point.decode_tps),
        "vs": against,
        "prefill t/s": rate(point.prefill_tps),
        "TTFT": seconds(point.ttft_s.median if point.ttft_s else None),
        "roofline": f"{point.roofline_share:.0%}" if point.roofline_share is not None else UNKNOWN,
        "J/token": f"{point.decode_j_per_token:.3g}" if point.decode_j_per_token else UNKNOWN,
        "kind": row.source.report.provenance,
    }


def memory_table(rows: Sequence[Entry]) -> Table:
    """Where the memory of each run went, and what its cache costs."""
    lines = []
    for row in rows:
        memory, cache = row.run.memory, row.run.cache
        weights = memory.weights_nbytes if memory else row.run.model.weights_nbytes
        lines.append(
            {
                "run": row.name,
                "peak RSS": mebibytes(memory.peak_rss_nbytes if memory else None),
                "on card": mebibytes(memory.card_nbytes if memory else None),
                "weights": mebibytes(weights),
                "cache": mebibytes(memory.cache_nbytes if memory else None),
                "compute": mebibytes(memory.compute_nbytes if memory else None),
                "other": mebibytes(memory.other_nbytes if memory else None),
                "bytes/token": whole(cache.nbytes_per_token),
                "context": whole(cache.n_ctx),
                "load": seconds(row.run.load_s),
            }
        )
    return without_empty(Table.of("Memory", "run", lines))


def provenance_table(rows: Sequence[Entry]) -> Table:
    """Where each run's figures come from."""
    lines = []
    for row in rows:
        report, run = row.source.report, row.run
        digest = f" {run.model.sha256[:10]}" if run.model.sha256 else ""
        lines.append(
            {
                "run": row.name,
                "kind": report.provenance,
                "machine": machine_name(report.machine),
                "engine": engine_name(run, report),
                "threads": whole(report.settings.threads),
                "model": f"{run.model.file}{digest}",
                "date": report.created[:10],
                "report": row.source.name,
            }
        )
    return Table.of("Provenance", "run", lines)


def machine_name(machine: Machine) -> str:
    """The board and, where there is one, the emulator."""
    return f"{machine.board} [{machine.emulator}]" if machine.emulator else machine.board


def machine_label(machine: Machine) -> str:
    """A machine in few words: its card where that ran the layers, else its board."""
    return machine.card or machine.board.removeprefix("Linux computer, ").replace("(R)", "")


def run_label(run: BenchRun) -> str:
    """A run in few words, where its machine is named beside it: the file and the cache type."""
    return f"{run.model.file.removesuffix('.gguf')} {run.cache.type}"


def engine_name(run: BenchRun, report: Report) -> str:
    """The engine and, where it is known, its version."""
    llama_cpp = report.software.llama_cpp
    versions = {"llama.cpp": llama_cpp, "llama-bench": llama_cpp, "onnx": report.software.onnxruntime}
    known = versions.get(run.engine)
    return f"{run.engine} {known}" if known else run.engine


def warnings(sources: Sequence[Source]) -> tuple[str, ...]:
    """What a reader must know before trusting the comparison."""
    rows = entries(sources)
    said = []
    models = {(row.run.model.sha256 or row.run.model.name) for row in rows}
    if len(models) > 1:
        names = sorted({row.run.model.file for row in rows})
        if len(names) < len(models):
            names = sorted({f"{row.run.model.file} ({row.run.model.name})" for row in rows})
        said.append(f"different models are compared: {', '.join(names)}")
    machines = {source.report.machine.board for source in sources}
    if len(machines) > 1:
        said.append(f"different machines are compared: {', '.join(sorted(machines))}")
    if len({(s.report.settings.n_prompt, s.report.settings.n_gen) for s in sources}) > 1:
        said.append("the reports timed different numbers of tokens (see n_prompt and n_gen in each)")
    for kind in sorted({source.report.provenance for source in sources} - {"measured"}):
        names = [row.name for row in rows if row.source.report.provenance == kind]
        said.append(f"{kind}, not measured on the board: {', '.join(names)}")
    noisy = [
        f"{row.name} at depth {point.depth} ({point.decode_tps.spread:.0%})"
        for row in rows
        for point in row.run.points
        if point.decode_tps and point.decode_tps.spread > NOISY_SPREAD
    ]
    if noisy:
        said.append(f"samples lie far apart, so that the machine was busy or hot: {', '.join(noisy)}")
    for row in rows:
        said += _run_warnings(row)
    return tuple(said)


def notes(sources: Sequence[Source]) -> tuple[str, ...]:
    """What the reports say about themselves: sensors that could not be read, and why."""
    return tuple(f"{source.name}: {note}" for source in sources for note in source.report.notes)


def _run_warnings(row: Entry) -> list[str]:
    said = [f"{row.name} failed: {row.run.error}"] if row.run.error else []
    before, after = row.run.before, row.run.after
    if after and after.throttling and after.throttling != (before.throttling if before else ()):
        said.append(f"{row.name}: throttling during the run: {', '.join(after.throttling)}")
    return said


def rate(stat: Stat | None) -> str:
    """A median in tokens per second."""
    if stat is None:
        return UNKNOWN
    return f"{stat.median:.1f}" if stat.median < 1000 else f"{stat.median:,.0f}"


def spread(stat: Stat | None) -> str:
    """How far the samples lie apart, or unknown with fewer than two."""
    return f"±{stat.spread / 2:.1%}" if stat and stat.high > stat.low else UNKNOWN
