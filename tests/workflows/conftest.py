"""Fixtures of the workflows: a text for the tiny models, and a record of the progress."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekv.progress import Progress


class Seen:
    """Stages that note what they are told, as (stage, done, total)."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, /) -> Progress:
        def note(done: int, total: int, figures: str = "", /) -> None:
            self.steps.append((stage, done, total))

        return note

    @property
    def finished(self) -> set[str]:
        """Stages that ended with all of their units done."""
        last = {stage: (done, total) for stage, done, total in self.steps}
        return {stage for stage, (done, total) in last.items() if done == total}


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 random letters, each a token of the tiny models."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(np.random.default_rng(5).choice(list("cdefgh xyz.\n"), 3000)))
    return path
