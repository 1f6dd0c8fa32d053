"""A text for the small models, whose tokens are single letters."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 random letters."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(rng.choice(list("cdefgh xyz.\n"), 600)))
    return path
