"""Tests in what people keep of llama-bench: an array, JSON lines, one object, with the engine's log around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.documents import SchemaError, parse
from edgekv.errors import InputError

# A line of JSON, however it is laid out; log lines may begin with "[1/3]", a number or a word.
_JSON_LINE = re.compile(
    r"""\s*( [\]}{"] | \[\s*($|[\[\]{"]) | -?\d[\d.eE+-]*\s*[\],]*\s*$ | (true|false|null)\b | ,?\s*$ )""",
    re.VERBOSE,
)
_REMEDY = "run it with `-o json`, as in `llama-bench -m MODEL -o json > FILE`"
_OTHER_FORMATS = {
    r"\|.*\| *t/s *\|": "llama-bench's table in Markdown",
    r'"?build_commit"?,': "llama-bench's CSV",
    r"(CREATE TABLE|INSERT INTO)\b": "llama-bench's SQL",
}


@dataclass(frozen=True)
class LlamaBench:
    """Tests as llama-bench wrote them, and a note on what else was in the file, or ""."""

    tests: list[dict[str, Any]]
    note: str = ""


def find_llama_bench(text: str, path: Path) -> LlamaBench | None:
    """The tests in a text; None for JSON of another kind.

    Raises:
        InputError: there is no JSON in it, or it is cut short.
    """
    try:
        return _tests([parse(text)])
    except SchemaError as error:
        whole = str(error)
    lines = text.split("\n")  # splitlines() also cuts inside strings, at U+2028
    json_lines = [line for line in lines if line.strip() and _JSON_LINE.match(line)]
    other = [line for line in lines if not _JSON_LINE.match(line)]
    for pattern, name in _OTHER_FORMATS.items():
        if any(re.match(pattern, line) for line in lines):
            raise InputError(f"{path} is {name}; {_REMEDY}")
    if not json_lines:
        raise InputError(
            f"{path} holds no JSON; take a report of `edgekv bench -o FILE`, or of llama-bench: {_REMEDY}"
        )
    try:
        found = _tests(list(_values("\n".join(json_lines))))
    except SchemaError as error:
        if "truncated" in str(error) or not json_lines[-1].rstrip().endswith(("]", "}")):
            raise InputError(f"{path} is cut short: its JSON does not end; run the bench again") from error
        raise InputError(
            f"{path} is not valid JSON ({error}); take the file as the bench wrote it, or run the bench again"
        ) from error
    if found is None:
        raise InputError(f"{path} is not valid JSON ({whole}); it was edited or damaged: run the bench again")
    if not other:
        return found
    shown = other[0].strip()[:60]
    return LlamaBench(
        found.tests, f"{len(other)} lines that are not JSON were skipped, the first is {shown!r}"
    )


def _tests(values: list[Any]) -> LlamaBench | None:
    """All tests in objects, lists of them, and lists of these; None unless all are llama-bench's."""
    tests = []
    for value in values:
        items = value if isinstance(value, list) else [value]
        for item in items:
            tests += item if isinstance(item, list) else [item]
    known = all(isinstance(test, dict) and "model_filename" in test for test in tests)
    return LlamaBench(tests) if tests and known else None


def _values(text: str) -> Iterator[Any]:
    """JSON values one after the other."""
    decoder, at, text = json.JSONDecoder(), 0, text.strip()
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError:
            end = len(text)
        yield parse(text[at:end])
        at = len(text) - len(text[end:].lstrip())
