"""Output that every command prints alike: JSON, tables, and the command line itself."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from typing import Any

import click


def command_line() -> str:
    """The command as it was typed, but for quotes that were not needed."""
    return "edgekv " + shlex.join(sys.argv[1:])


def print_json(document: Any) -> None:
    """Print a document for scripts."""
    click.echo(json.dumps(document, indent=1))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table for people, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
