"""Request: the frozen base class of all workflows' requests, which takes paths as Path or as str."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A frozen request; a str in a field for paths becomes a Path."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if "Path" in str(field.type):
                object.__setattr__(self, field.name, as_paths(getattr(self, field.name)))


def as_paths(value: Any) -> Any:
    """A str as Path, a list or tuple of them as a tuple of Path; anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(as_paths(item) for item in value)
    return Path(value) if isinstance(value, str) else value
