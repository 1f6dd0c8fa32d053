"""One progress bar for every command that takes more than a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgekv.progress import Progress


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Progress]:
    """A progress bar with the time left, where stderr is a terminal; gives a function of (done, total)."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, figures="": bar.update(task, completed=done, total=total)
