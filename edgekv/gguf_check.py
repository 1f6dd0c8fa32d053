"""Validation of a GGUF file before any native code sees it."""

from __future__ import annotations

from pathlib import Path


def check_gguf(path: Path) -> None:
    """Raise ModelFileError if the file is not a sound GGUF."""
