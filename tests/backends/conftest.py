"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekv.backends.llama_cpp.kernel.build import build
from edgekv.backends.llama_cpp.kernel.ggml import ggml
from edgekv.backends.llama_cpp.kernel.load import _load_once


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attention kernel, built in a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return build()


@pytest.fixture(scope="module")
def kernel_unloaded() -> Iterator[None]:
    """What a module loads would compute the attention of every later test in this process."""
    yield
    while reg := ggml("ggml_backend_reg_by_name")(b"EdgeKV"):
        ggml("ggml_backend_unload")(reg)
    _load_once.cache_clear()
