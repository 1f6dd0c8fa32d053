"""Frozen dataclasses to JSON and back, strictly, and the JSON Schema that says the same.

One set of dataclasses is the single truth: `decode` refuses what the dataclass does not have, and
`json_schema` publishes it for everybody else. Handled: dataclasses, str, int, float, bool, Literal,
`X | None`, `tuple[X, ...]` and `Mapping[str, X]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value does not fit; `where` is its path, such as `runs[0].points[2].depth`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where or 'the document'}: {problem}")
        self.where = where


def encode(value: Any) -> Any:
    """A value as plain JSON types; dataclasses become objects in field order."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], value: Any, where: str = "") -> T:
    """Build a dataclass from parsed JSON.

    Raises:
        SchemaError: a key is missing, unknown, or holds the wrong kind of value.
    """
    if not isinstance(value, dict):
        raise SchemaError(where, f"expected an object, found {_kind(value)}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # T is a dataclass by contract
    if unknown := sorted(set(value) - set(known)):
        raise SchemaError(_join(where, unknown[0]), "unknown key")
    built = {}
    for name, field in known.items():
        if name in value:
            built[name] = _decode(hints[name], value[name], _join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SchemaError(_join(where, name), "missing")
    return cls(**built)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin is UnionType:
        if value is None and NoneType in get_args(hint):
            return None
        return _decode(next(arg for arg in get_args(hint) if arg is not NoneType), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise SchemaError(where, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        return tuple(_decode_list(get_args(hint)[0], value, where))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise SchemaError(where, f"expected an object, found {_kind(value)}")
        return {key: _decode(get_args(hint)[1], item, _join(where, key)) for key, item in value.items()}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return decode(hint, value, where)
    return _decode_scalar(hint, value, where)


def _decode_list(item_hint: Any, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError(where, f"expected a list, found {_kind(value)}")
    return [_decode(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value)]


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SchemaError(where, f"expected {_kind_of(hint)}, found {_kind(value)}")
    if hint is float and not math.isfinite(value):
        raise SchemaError(where, f"{value} is not a finite number")
    return value


def json_schema(cls: type[Any], schema_id: str, title: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `decode(cls, ...)` accepts."""
    defs: dict[str, Any] = {}
    _define(cls, defs)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": schema_id,
        "title": title,
        "$ref": f"#/$defs/{cls.__name__}",
        "$defs": dict(sorted(defs.items())),
    }


def _define(cls: type[Any], defs: dict[str, Any]) -> None:
    if cls.__name__ in defs:
        return
    defs[cls.__name__] = {}  # reserves the name
    hints = get_type_hints(cls)
    properties = {f.name: _describe(hints[f.name], f.metadata.get("doc", ""), defs) for f in fields(cls)}
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    defs[cls.__name__] = {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _describe(hint: Any, doc: str, defs: dict[str, Any]) -> dict[str, Any]:
    described = _schema(hint, defs)
    return described | {"description": doc} if doc else described


def _schema(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin is UnionType:
        return {"anyOf": [_schema(arg, defs) for arg in get_args(hint)]}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0], defs)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1], defs)}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        _define(hint, defs)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
    return {"type": names[hint]}


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _kind_of(hint: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)
