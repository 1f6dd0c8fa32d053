"""Tables of text for a terminal and for Markdown, and the figures in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """A title (or ""), column heads and rows of text; the first column is text, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, first: str, rows: Sequence[Mapping[str, str]]) -> Table:
        """A table of rows by column head, all with the same columns; `first` heads the first one."""
        head = tuple(rows[0]) if rows else (first,)
        return cls(title, head, tuple(tuple(row.values()) for row in rows))


def without_empty(table: Table) -> Table:
    """The table without columns in which nothing is known."""
    kept = [i for i in range(len(table.head)) if i == 0 or any(row[i] != UNKNOWN for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.title, tuple(table.head[i] for i in kept), rows)


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    lines = [table.head, ["-" * width for width in widths], *table.rows]
    title = [table.title] if table.title else []
    return "\n".join(title + [_line(line, widths) for line in lines])


def as_markdown(table: Table) -> str:
    """A GitHub table."""
    head = "| " + " | ".join(table.head) + " |"
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(table.head) - 1)) + "|"
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join([f"### {table.title}", "", head, rule, *rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest]).rstrip()


def seconds(value: float | None) -> str:
    """A time as ms or s."""
    if value is None:
        return UNKNOWN
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def mebibytes(value: int | None) -> str:
    """A size in MiB."""
    return UNKNOWN if value is None else f"{value / 2**20:,.1f} MiB"


def whole(value: int | None) -> str:
    """A whole number with separators."""
    return UNKNOWN if value is None else f"{value:,}"
