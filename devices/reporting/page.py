"""The comparison page: one self-contained HTML file without scripts or network access."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgekv.devices.reporting.charts import memory_chart, provenance, speed_chart, time_chart
from edgekv.devices.reporting.svg import N_COLOURS
from edgekv.devices.reporting.tables import Entry, Source, Table, entries, tables, warnings

STYLE = Path(__file__).with_name("page.css")
# Nothing may be loaded from anywhere, even if a report smuggled markup past the escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
KINDS = {
    "measured": "ran on that machine",
    "emulated": "ran on an emulated CPU: memory is real, times are not the board's",
    "projected": "calculated, never ran",
}


def html_page(sources: Sequence[Source]) -> str:
    """The page as text."""
    rows = entries(sources)
    charts = (
        ("Decode speed", speed_chart(rows), "Bars span all samples. Higher is better."),
        (
            "Memory",
            memory_chart(rows),
            "Dots: the whole process at its peak. Lines: other contexts, calculated.",
        ),
        ("Where the time goes", time_chart(rows), _time_legend()),
    )
    drawn = "".join(
        f"<figure><h2>{title}</h2>{svg}<figcaption>{note}</figcaption></figure>"
        for title, svg, note in charts
        if svg
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>EdgeKV comparison</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>EdgeKV comparison</h1>{_legend(rows)}{_warnings(sources)}"
        f'<div class="charts">{drawn}</div>'
        + "".join(_table(table) for table in tables(sources))
        + "<h2>Reports</h2>"
        + "".join(_details(source) for source in sources)
        + "</body></html>\n"
    )


def _legend(rows: Sequence[Entry]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 28 10"><line class="line {kind} c{i % N_COLOURS}" x1="0" x2="28" y1="5" '
        f'y2="5"/><circle class="dot {kind} c{i % N_COLOURS}" cx="14" cy="5" r="3.5"/></svg>'
        f"{escape(row.name)} {_badge(kind)}<br><small>{escape(provenance(row))}</small></li>"
        for i, row in enumerate(rows)
        for kind in (row.source.report.provenance,)
    )
    kinds = "".join(f"<li>{_badge(kind)} {meaning}</li>" for kind, meaning in KINDS.items())
    return f'<ul class="legend">{items}</ul><ul class="kinds">{kinds}</ul>'


def _time_legend() -> str:
    names = (("weights", "weights"), ("attention", "attention over the cache"), ("rest", "all else"))
    return " ".join(
        f'<svg class="key" viewBox="0 0 12 10"><rect class="{style}" width="12" height="10"/></svg> {name}'
        for style, name in names
    )


def _badge(kind: str) -> str:
    return f'<span class="badge {kind}">{kind}</span>'


def _warnings(sources: Sequence[Source]) -> str:
    said = "".join(f"<li>{escape(text)}</li>" for text in warnings(sources))
    return f'<ul class="notes">{said}</ul>' if said else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return _badge(text) if text in KINDS else escape(text)


def _details(source: Source) -> str:
    report = source.report
    machine, settings, software = report.machine, report.settings, report.software
    ram = f"{machine.ram_nbytes / 2**30:.1f} GiB RAM" if machine.ram_nbytes else None
    cores = ", ".join(f"{len(group.cpus)} x {group.name}" for group in machine.cores)
    depths = ", ".join(str(depth) for depth in settings.depths)
    facts = {
        "kind": report.provenance,
        "command": report.command,
        "when": report.created,
        "machine": ", ".join(filter(None, (machine.board, machine.soc, cores, ram, machine.memory_type))),
        "CPU": ", ".join(filter(None, (machine.arch, " ".join(machine.isa_flags), machine.governor))),
        "system": ", ".join(filter(None, (machine.kernel, machine.emulator))),
        "software": ", ".join(
            f"{name} {value}"
            for name, value in (
                ("EdgeKV", software.edgekv),
                ("Python", software.python),
                ("llama.cpp", software.llama_cpp),
            )
            if value
        ),
        "llama.cpp uses": " ".join(software.llama_cpp_features),
        "settings": f"prompt {settings.n_prompt}, answer {settings.n_gen}, {settings.repeats} samples a point, "
        f"depths {depths}, CPUs {', '.join(map(str, settings.cpus)) or 'not known'}, "
        + ("in turns" if settings.turns else "one after the other"),
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<details><summary>{escape(source.name)}</summary><dl>{items}</dl><ul>{notes}</ul></details>"
