"""Fixtures of the engines' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekv.backends.llama_cpp.kernel.build import build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attention kernel, built in a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return build()
