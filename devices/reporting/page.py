"""Comparison page: one self-contained HTML file without scripts or network access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgekv.devices.reporting.charts import memory_chart, speed_chart, time_chart
from edgekv.devices.reporting.report import Report
from edgekv.devices.reporting.svg import N_COLOURS
from edgekv.devices.reporting.tables import Entry, Source, entries, machine_label, run_label, tables, warnings

STYLE = Path(__file__).with_name("page.css")
KINDS = {
    "measured": "ran on that machine",
    "emulated": "ran on an emulated CPU: memory is real, times are not the board's",
    "projected": "calculated, never ran",
}
TIME_PARTS = {
    "weights": "weights",
    "attention": "attention over the cache",
    "rest": "all else",
}  # by CSS class


def html_page(sources: Sequence[Source]) -> str:
    """The page as text; whatever a report says is escaped."""
    rows = entries(sources)
    charts = (
        ("Decode speed", speed_chart(rows), "Bars span all samples. Higher is better."),
        (
            "Memory",
            memory_chart(rows),
            "Dots: the whole process at its peak. Lines: other contexts, calculated.",
        ),
        ("Where the time goes", time_chart(rows), None),
    )
    grouped: dict[str, list[tuple[int, Entry]]] = {}
    for i, row in enumerate(rows):
        grouped.setdefault(machine_label(row.source.report.machine), []).append((i, row))
    page = Environment(autoescape=True, loader=FileSystemLoader(STYLE.parent), undefined=StrictUndefined)
    return page.get_template("page.html.jinja").render(
        style=Markup(STYLE.read_text(encoding="utf-8")),
        n_runs=len(rows),
        machines=grouped,
        run_label=run_label,
        n_colours=N_COLOURS,
        kinds=KINDS,
        warnings=warnings(sources),
        charts=[(title, Markup(svg), note) for title, svg, note in charts if svg],  # svg.py escapes its texts
        time_parts=TIME_PARTS,
        tables=tables(sources),
        sources=sources,
        facts=_facts,
    )


def _facts(report: Report) -> dict[str, str]:
    """A report's machine, programs and settings by name; empty where not known."""
    machine, settings, software = report.machine, report.settings, report.software
    ram = f"{machine.ram_nbytes / 2**30:.1f} GiB RAM" if machine.ram_nbytes else None
    cores = ", ".join(f"{len(group.cpus)} x {group.name}" for group in machine.cores)
    depths = ", ".join(str(depth) for depth in settings.depths)
    versions = (("EdgeKV", software.edgekv), ("Python", software.python), ("llama.cpp", software.llama_cpp))
    return {
        "kind": report.provenance,
        "command": report.command,
        "when": report.created,
        "machine": ", ".join(filter(None, (machine.board, machine.soc, cores, ram, machine.memory_type))),
        "CPU": ", ".join(filter(None, (machine.arch, " ".join(machine.isa_flags), machine.governor))),
        "system": ", ".join(filter(None, (machine.kernel, machine.emulator))),
        "software": ", ".join(f"{name} {value}" for name, value in versions if value),
        "llama.cpp uses": " ".join(software.llama_cpp_features),
        "settings": f"prompt {settings.n_prompt}, answer {settings.n_gen}, {settings.repeats} samples per point, "
        f"depths {depths}, CPUs {', '.join(map(str, settings.cpus)) or 'not known'}, "
        + ("in turns" if settings.turns else "one after the other"),
    }
