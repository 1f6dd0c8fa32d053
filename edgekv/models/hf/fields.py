"""Typed access to config.json: a missing or mistyped field is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from edgekv.errors import ModelFileError, UnsupportedError


class Fields:
    """The fields of one JSON object of a config."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self._path = path
        self._prefix = prefix

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            self.fail(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value > 0 and isfinite(value)):
            self.fail(name, "a positive number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        values = self._get(name, None)
        ok = isinstance(values, list) and len(values) == count
        if not ok or not all(isinstance(v, int | float) and v > 0 for v in values):
            self.fail(name, f"a list of {count} positive numbers")
        return tuple(float(v) for v in values)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, "a text")
        return value

    def inner(self, name: str) -> Fields | None:
        """The fields of an object in this one, if it is there."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return Fields(value, self._path, f"{self._prefix}{name}.")

    def require(self, name: str, allowed: tuple[Any, ...], what: str) -> None:
        """Raise UnsupportedError unless the field is absent, null or one of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.unsupported(f"{what} ({self._prefix}{name} is {value!r})")

    def fail(self, name: str, expected: str) -> NoReturn:
        found = repr(self.values[name]) if name in self.values else "missing"
        raise ModelFileError(
            f"{self._path}: field {self._prefix}{name} is {found}, {expected} was expected; "
            "download config.json again"
        )

    def unsupported(self, what: str, remedy: str = "choose another model of the family") -> NoReturn:
        raise UnsupportedError(f"{self._path}: {what} is not supported; {remedy}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(name, "a value")
        return value
