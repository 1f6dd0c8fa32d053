"""Named values of a model file: a missing or mistyped one is an error that names it and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from edgekv.errors import ModelFileError, UnsupportedError


def positive(value: Any) -> float | None:
    """The value as a float, if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no bounds
        return None
    return number if 0 < number < inf else None


class Fields:
    """Typed access to values by name; the kinds of file differ in their words.

    Args:
        values: what the file says, by name.
        path: the file.
        prefix: of every name, in messages.
    """

    noun: ClassVar[str] = "field"
    file_remedy: ClassVar[str] = "download the file again"  # where the file contradicts itself
    model_remedy: ClassVar[str] = "choose another model"  # where the file is sound

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number below 2^31."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            self.fail(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        number = positive(self._get(name, default))
        if number is None:
            self.fail(name, "a positive number")
        return number

    def optional(self, name: str) -> Any:
        """The value as it is, or None."""
        return self.values.get(name)

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise ModelFileError: a value is missing or not what was expected."""
        found = repr(self.values[name]) if name in self.values else "missing"
        self.malformed(f"{self.noun} {self.prefix}{name} is {found}, {expected} was expected")

    def malformed(self, problem: str, remedy: str = "") -> NoReturn:
        """Raise ModelFileError: the file contradicts itself."""
        raise ModelFileError(f"{self.path}: {problem}; {remedy or self.file_remedy}")

    def unsupported(self, what: str, remedy: str = "") -> NoReturn:
        """Raise UnsupportedError: the file is sound, but EdgeKV does not compute such a model."""
        raise UnsupportedError(f"{self.path}: {what} is not supported; {remedy or self.model_remedy}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.optional(name)
        return default if value is None else value
