"""Progress: how far a piece of work is, told to whoever shows it.

A workflow opens one stage after the other by name and tells each stage's Progress what is done. The command line
draws a line for it (edgekv/cli/common/progress.py), a server may send it on, and `silent` drops it.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One stage of the work."""

    def __call__(self, done: int, total: int, figures: str = "", /) -> None:
        """`done` of `total` units are finished; `figures` are results so far, for people."""


class Stages(Protocol):
    """A workflow's stages, one after the other."""

    def __call__(self, stage: str, /) -> Progress:
        """Begin a stage of this name, such as "converting"."""


def ignore(done: int, total: int, figures: str = "", /) -> None:
    """A Progress that nobody looks at."""


def silent(stage: str, /) -> Progress:
    """Stages that nobody looks at."""
    return ignore
