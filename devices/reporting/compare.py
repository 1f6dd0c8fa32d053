"""Comparisons of reports: reading them, and their text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekv import documents
from edgekv.devices.reporting.llama_bench import parse_llama_bench
from edgekv.devices.reporting.llama_bench_text import find_llama_bench
from edgekv.devices.reporting.report import Report, parse_report, read_text
from edgekv.devices.reporting.tables import Source, entries, notes, tables, warnings
from edgekv.devices.reporting.text_table import as_markdown, as_text
from edgekv.documents import dumps
from edgekv.errors import InputError


def load_sources(paths: Sequence[Path]) -> tuple[Source, ...]:
    """Read reports of EdgeKV and of llama-bench; files of the same name go by their path.

    Raises:
        InputError: one of them cannot be read.
    """
    names = [path.name for path in paths]
    found = []
    for path in paths:
        name = path.name if names.count(path.name) == 1 else str(path)
        found += [Source(name, report) for report in _reports(path)]
    return tuple(found)


def _reports(path: Path) -> tuple[Report, ...]:
    """The report in a file of EdgeKV, or those in one of llama-bench."""
    text = read_text(path)
    try:
        if tests := find_llama_bench(text, path):
            return parse_llama_bench(tests, path)
        return (parse_report(documents.parse(text), path),)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply for a report; wrong file?") from error


def as_terminal(sources: Sequence[Source]) -> str:
    """Aligned tables and notes."""
    said = [f"warning: {text}" for text in warnings(sources)] + [f"note: {text}" for text in notes(sources)]
    return "\n\n".join(filter(None, [*map(as_text, tables(sources)), "\n".join(said)]))


def as_document(sources: Sequence[Source]) -> str:
    """Markdown tables and notes."""
    said = [f"- {text}" for text in (*warnings(sources), *notes(sources))]
    return "\n\n".join(filter(None, [*map(as_markdown, tables(sources)), "\n".join(said)]))


def as_json(sources: Sequence[Source]) -> str:
    """Every run with its machine and provenance, and the warnings."""
    runs = [
        {
            "name": entry.name,
            "provenance": entry.source.report.provenance,
            "report": entry.source.name,
            "machine": entry.source.report.machine,
            "run": entry.run,
        }
        for entry in entries(sources)
    ]
    return dumps({"runs": runs, "warnings": warnings(sources)}, indent=1)
