"""Mutations of files, the same for the same random numbers: bytes, JSON, JSON in a header, GGUF keys, lines of text."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Sequence
from io import BytesIO
from random import Random
from typing import Any

import numpy as np

from edgekv.cache.blocks import NewBlock, read_blocks

Mutator = Callable[[Random, bytes], bytes]
NESTED = "[" * 3000 + "]" * 3000
PATHS = ("../../x", "/dev/zero", "x" * 300, "a\0b", "\ud800", "\u2028", "[/bold]\x1b[31m")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, 1.5, -0.5, 1e308, 5e-324, float("nan"), float("inf"), "", "a", "0", "1e9", *PATHS),
    *([], [None], [0, 1], {}, {"": None}, [[]], {"a": {"b": []}}),
)
# Fixed-size numbers as headers have them
_NUMBERS = [struct.pack("<" + code, value) for code, values in {
    "B": (0, 1, 127, 255), "H": (0, 2**16 - 1), "I": (0, 1, 2**31 - 1, 2**31, 2**32 - 1),
    "Q": (0, 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1), "f": (float("nan"), float("inf"), -1.0),
}.items() for value in values]  # fmt: skip


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """One to four changes, more of them near the front, where headers are."""
    for _ in range(rng.randint(1, 4)):
        at = int(len(data) * rng.random() ** 3)
        length = rng.choice((1, 2, 4, 8, 64, len(data) // 4 + 1))
        kind = rng.randrange(7)
        if kind == 0 and data:
            flipped = data[at : at + 1] or b"\0"
            data = data[:at] + bytes([flipped[0] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            number = rng.choice(_NUMBERS)
            data = data[:at] + number + data[at + len(number) :]
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(min(length, 64)) + data[at:]
        elif kind == 4:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 5:
            data = data[:at]
        else:
            other = int(len(data) * rng.random())
            data = data[:at] + data[other : other + length] + data[at + length :]
    return data


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Other values, missing, doubled, renamed and unknown keys; one time in eight, bytes."""
    if rng.randrange(8) == 0:
        return mutate_bytes(rng, data)
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        document = _with_other_value(rng, document)
    return _dumped(document)


def mutate_lines_of_json(rng: Random, data: bytes) -> bytes:
    """Some of the lines."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at]).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """The JSON in front, with its length made right; or bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.randrange(3) == 0:
        return mutate_bytes(rng, data)
    header = _dumped(_with_nested_json(rng, json.loads(data[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_blocks(rng: Random, data: bytes) -> bytes:
    """A file of sessions and packs: blocks whose checksums are made right; or bytes."""
    if rng.randrange(3) == 0:
        return mutate_bytes(rng, data)
    blocks = read_blocks(np.frombuffer(data, np.uint8))
    at, file = rng.randrange(len(blocks)), BytesIO()
    for number, block in enumerate(blocks):
        kind, numbers, payload = (
            block.kind or 0,
            block.numbers,
            b"" if block.payload is None else bytes(block.payload),
        )
        if number == at:
            change = rng.randrange(4)
            numbers = (
                rng.choice(((0, 0), (2**32 - 1, 2**32 - 1), (numbers[1], numbers[0])))
                if change == 0
                else numbers
            )
            kind = rng.choice((0, 1, 2, 3, 2**31)) if change == 1 else kind
            if change > 1:
                payload = (mutate_json if payload[:1] == b"{" else mutate_bytes)(rng, payload)
        for _ in range(2 if number == at and rng.randrange(8) == 0 else 1):
            NewBlock(kind, numbers, [np.frombuffer(payload, np.uint8)]).write(file)
    return file.getvalue()


def mutate_own_gguf(rng: Random, data: bytes) -> bytes:
    """The JSON in the key of EdgeKV's own architecture, with its length made right."""
    key = b"edgekv.spec" + struct.pack("<I", 8)
    start = data.index(key) + len(key)
    length = int.from_bytes(data[start : start + 8], "little")
    text = mutate_json(rng, data[start + 8 : start + 8 + length])
    return data[:start] + struct.pack("<Q", len(text)) + text + data[start + 8 + length :] + bytes(64)


def mutate_words(words: Sequence[str]) -> Mutator:
    """A mutator of a text that cuts it at its words and puts others in, moves and doubles them."""

    def mutate(rng: Random, data: bytes) -> bytes:
        if rng.randrange(6) == 0:
            return mutate_bytes(rng, data)
        text = data.decode()
        for _ in range(rng.randint(1, 4)):
            parts = _parts(text)
            at = rng.randrange(len(parts) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                del parts[at : at + rng.randint(1, 3)]
            elif kind == 1:
                parts.insert(at, rng.choice(parts or [""]))
            elif kind == 2:
                parts[at : at + 1] = [rng.choice(words)]
            else:
                parts.insert(at, rng.choice(words))
            text = "".join(parts)
        return text.encode("utf-8", "surrogatepass")

    return mutate


def mutate_gguf(rng: Random, data: bytes) -> bytes:
    """Keys with values of other types and sizes, and bytes of the header."""
    if rng.randrange(2):
        return mutate_bytes(rng, data[: len(data) // 2]) + data[len(data) // 2 :]
    for _ in range(rng.randint(1, 2)):
        start, stop = rng.choice(_gguf_values(data) or [(24, 28)])
        data = data[:start] + _gguf_value(rng) + data[stop:]
    return data + bytes(64)  # tensors move by less than their alignment


def _gguf_value(rng: Random) -> bytes:
    """A value of any type with the type in front."""
    kind = rng.choice((0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13))
    text = struct.pack("<Q", 2) + b"ab"
    codes = {0: "B", 1: "b", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    if kind in codes:
        size = struct.calcsize(codes[kind])
        number = rng.choice([n for n in _NUMBERS if len(n) == size] or [rng.randbytes(size)])
        return struct.pack("<I", kind) + (number if rng.randrange(2) else rng.randbytes(size))
    if kind == 8:
        return struct.pack("<I", 8) + rng.choice((text, struct.pack("<Q", 0), struct.pack("<Q", 1) + b"\xff"))
    if kind == 9:
        count = rng.choice((0, 1, 2, 300))
        item = rng.choice((4, 5, 6, 7, 8, 9))
        items = text * count if item == 8 else rng.randbytes(count * (1 if item == 7 else 4))
        return struct.pack("<IIQ", 9, item, rng.choice((count, count, 2**24, 2**63))) + items
    return struct.pack("<I", kind)


def _gguf_values(data: bytes) -> list[tuple[int, int]]:
    """Where the value of each key begins, with its type, and ends."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at, found = 24, []

    def number(size: int, where: int) -> int:
        return int.from_bytes(data[where : where + size], "little")

    def value_end(kind: int, where: int) -> int:
        if kind == 8:
            return where + 8 + number(8, where)
        if kind != 9:
            return where + sizes[kind]
        item, count, where = number(4, where), number(8, where + 4), where + 12
        for _ in range(min(count, len(data))):
            if where > len(data) or item == 9:
                raise KeyError(item)  # it was changed before
            where = value_end(item, where)
        return where

    for _ in range(number(8, 16)):
        start = at + 8 + number(8, at)
        try:
            at = value_end(number(4, start), start + 4)
        except KeyError:  # a value that was changed before
            break
        found.append((start, at))
    return found


def _with_nested_json(rng: Random, document: Any) -> Any:
    """As `_with_other_value`, also inside of JSON that a text of the document holds."""
    metadata = document.get("__metadata__") or {}
    inner = [key for key, value in metadata.items() if value.startswith("{")]
    if inner and rng.randrange(4):
        changed = _with_other_value(rng, json.loads(metadata[inner[0]]))
        metadata[inner[0]] = _dumped(changed).decode("utf-8", "surrogatepass")
        return document
    return _with_other_value(rng, document)


def _with_other_value(rng: Random, document: Any) -> Any:
    """The document with one change somewhere inside."""
    places = list(_places(document))
    if not places or rng.randrange(50) == 0:
        return _value(rng)
    container, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 1:
        container[str(rng.choice(PATHS)) if rng.randrange(2) else f"{key}2"] = container.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        container[key] = copy.deepcopy(other[place])
    elif kind == 3 and isinstance(container[key], int | float) and abs(container[key]) < 2**60:
        container[key] += rng.choice((-1, 1, 0.5, 1000))
    elif kind == 4 and isinstance(container, dict):
        container["unknown"] = _value(rng)
    else:
        container[key] = _value(rng)
    return document


def _value(rng: Random) -> Any:
    """One of VALUES, of its own: the document is changed in place."""
    return copy.deepcopy(rng.choice(VALUES))


def _places(value: Any) -> Any:
    """(container, key) of every value inside of a document; of long lists, some."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:40]:
        yield value, key
        yield from _places(item)


def _dumped(document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=False).replace('"a": {"b": []}', f'"a": {NESTED}')
    return text.encode("utf-8", "surrogatepass")


def _parts(text: str) -> list[str]:
    """A text in pieces, cut between words, signs and blanks."""
    parts, last = [""], ""
    for letter in text:
        kind = "w" if letter.isalnum() or letter == "_" else letter
        if kind != last:
            parts.append("")
        parts[-1] += letter
        last = kind
    return parts[1:]
