"""Request: the base of what workflows are asked, frozen, with paths given as Path or as text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A frozen request; text in a field for paths becomes a Path."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if "Path" in str(field.type):
                object.__setattr__(self, field.name, _as_paths(getattr(self, field.name)))


def _as_paths(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_as_paths(item) for item in value)
    return Path(value) if isinstance(value, str) else value
