"""JSON documents as frozen types: read strictly and written plainly, by msgspec.

A document is a `Document` or a frozen dataclass. Unknown keys are refused; NaN and infinity are neither read nor
written. The JSON Schema of a `Document` is `msgspec.json.schema(type)`.
"""

from __future__ import annotations

import json
import math
import re
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value does not fit; `where` is its path, such as `runs[0].points[2].depth`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object with exactly these fields; a subclass repeats `frozen=True` for type checkers."""


def parse(text: str | bytes) -> Any:
    """JSON text (UTF-8) as plain Python values.

    Raises:
        SchemaError: it is not JSON, which knows no NaN and no number past float64.
        RecursionError: it is nested too deeply.
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise SchemaError("", str(error).removeprefix("JSON is malformed: ")) from error


def decode(kind: type[T], value: Any) -> T:
    """A document, or a container of documents, from plain values.

    Raises:
        SchemaError: a key is missing, unknown, or holds the wrong kind of value.
    """
    try:
        built = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explained(kind, str(error)) from error
    _check_taken(value, encode(built), "")
    return built


def _explained(kind: Any, message: str) -> SchemaError:
    """msgspec's message, the place first; what it leaves out of it is added."""
    problem, _, where = message.partition(" - at `$")
    where = where.strip(".`")
    if field := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", problem):
        what = "missing" if field[1] == "missing required" else "unknown key"
        return SchemaError(f"{where}.{field[2]}".lstrip("."), what)
    if problem.startswith("Invalid enum value "):
        choices = ", ".join(map(str, _choices(kind, where)))
        return SchemaError(where, f"{problem.removeprefix('Invalid enum value ')} is not one of {choices}")
    return SchemaError(where, problem[:1].lower() + problem[1:])


def _choices(kind: Any, where: str) -> tuple[Any, ...]:
    """What the Literal at a place in a type allows."""
    for step in re.findall(r"\[|[A-Za-z_]\w*", where):
        if step == "[":  # of tuple[X, ...] or Mapping[str, X]
            kind = next(inner for inner in reversed(get_args(kind)) if inner is not ...)
        else:
            kind = get_type_hints(kind)[step]
        if NoneType in get_args(kind):
            kind = get_args(kind)[0]
    return get_args(kind)


def _check_taken(value: Any, built: Any, where: str) -> None:
    """Raise SchemaError for a key that `built` has not taken up, as msgspec lets a dataclass do, and for NaN."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in built:
                raise SchemaError(f"{where}.{key}".lstrip("."), "unknown key")
            _check_taken(item, built[key], f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, (item, taken) in enumerate(zip(value, built, strict=True)):
            _check_taken(item, taken, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(where, f"{value} is not a finite number")


def encode(value: Any) -> Any:
    """A document or dataclass as plain values; objects have their keys in field order."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, float):  # np.float64 is one
        return float(value)
    raise TypeError(f"{type(value)} has no place in JSON")


def dumps(value: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """A document or dataclass as JSON text.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    return json.dumps(encode(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
