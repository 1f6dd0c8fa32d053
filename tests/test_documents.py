"""Documents: what is refused on the way in and on the way out, and how the place is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from msgspec import Meta

from edgekv.documents import Document, SchemaError, decode, dumps, encode, parse


class Part(Document, frozen=True):
    size: Annotated[int, Meta(ge=0)]
    speed: float | None = None
    at: Literal[0, 512] = 0


class Whole(Document, frozen=True):
    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part] = {}
    unit: Literal["s", "ms"] | None = None


@dataclass(frozen=True)
class Figures:
    kl: float
    names: tuple[str, ...]


GOOD: dict[str, Any] = {"kind": "a", "parts": [{"size": 1}], "by_name": {"x": {"size": 2, "speed": 3}}}


def test_there_and_back() -> None:
    whole = decode(Whole, GOOD)
    assert whole == Whole("a", (Part(1),), {"x": Part(2, 3.0)})
    assert decode(Whole, parse(dumps(whole))) == whole
    assert list(encode(whole)) == ["kind", "parts", "by_name", "unit"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "more: unknown key"),
        ({"parts": [{"size": 1, "sizes": 2}]}, r"parts\[0\]\.sizes: unknown key"),
        ({"parts": [{"size": 1}, {}]}, r"parts\[1\]\.size: missing"),
        ({"parts": [{"size": True}]}, r"parts\[0\]\.size: expected `int`, got `bool`"),
        ({"parts": [{"size": 1.0}]}, r"parts\[0\]\.size: expected `int`, got `float`"),
        ({"parts": [{"size": "1"}]}, r"parts\[0\]\.size: expected `int`, got `str`"),
        ({"parts": [{"size": -1}]}, r"parts\[0\]\.size: expected `int` >= 0"),
        ({"kind": "c"}, "kind: 'c' is not one of a, b"),
        ({"unit": "h"}, "unit: 'h' is not one of s, ms"),
        ({"parts": [{"size": 1, "at": 7}]}, r"parts\[0\]\.at: 7 is not one of 0, 512"),
        ({"by_name": {"x": {"size": 1, "at": 7}}}, r"by_name\[\.\.\.\]\.at: 7 is not one of 0, 512"),
        ({"by_name": {"x": {"size": None}}}, r"by_name\[\.\.\.\]\.size: expected `int`, got `null`"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=f"^{message}$"):
        decode(Whole, GOOD | change)


def test_a_dataclass_is_read_as_strictly() -> None:
    good = {"kl": 1, "names": ["a"]}
    assert decode(Figures, good) == Figures(1.0, ("a",))
    with pytest.raises(SchemaError, match=r"^more: unknown key$"):
        decode(Figures, good | {"more": 1})
    with pytest.raises(SchemaError, match=r"^\[1\]\.more: unknown key$"):
        decode(tuple[Figures, ...], [good, good | {"more": 1}])
    with pytest.raises(SchemaError, match=r"^kl: nan is not a finite number$"):
        decode(Figures, good | {"kl": float("nan")})


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "[-Infinity]", "[1e999]", "{", "", "1 2", b'"\xff"'])
def test_what_is_not_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(SchemaError):
        parse(text)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float64("nan")])
def test_no_number_is_written_that_json_does_not_have(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps(Figures(number, ()))


def test_dataclasses_are_written_in_field_order() -> None:
    assert dumps(Figures(np.float64(0.1), ("é",))) == '{"kl": 0.1, "names": ["\\u00e9"]}'
    with pytest.raises(TypeError, match="no place in JSON"):
        dumps(Figures(0.0, (object(),)))  # type: ignore[arg-type]
