"""Blocks: a file that is only ever appended to, in pieces that each carry their checksum.

A block is a header of 32 bytes, then its payload:

    4 bytes  "EKVB"
    4        kind
    8        length of the payload
    8        two numbers for the kind's own use
    4        CRC-32 of the payload
    4        CRC-32 of the 28 bytes before

all little-endian. A process that is killed while it appends leaves a file that ends within a block, which is told from
damage: a complete header with another checksum, or a complete payload with one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from edgekv.cache.rows import Bytes

MAGIC = b"EKVB"
_HEADER = struct.Struct("<4sIQIIII")
HEADER_NBYTES = _HEADER.size
_CHECKED = HEADER_NBYTES - 4
_WINDOW = 2**16  # bytes searched at once


@dataclass(frozen=True)
class Block:
    """A block that was read. `payload` is None where it is damaged; `kind` is None where the header is."""

    kind: int | None
    numbers: tuple[int, int]
    payload: Bytes | None
    start: int
    stop: int


@dataclass(frozen=True)
class NewBlock:
    """A block to be written; its payload is the parts one after the other."""

    kind: int
    numbers: tuple[int, int]
    parts: Sequence[Bytes]

    @property
    def nbytes(self) -> int:
        return _HEADER.size + sum(len(part) for part in self.parts)

    def write(self, file: IO[bytes]) -> None:
        """Append it to a file."""
        checksum = 0
        for part in self.parts:
            checksum = zlib.crc32(part.data, checksum)
        length = self.nbytes - _HEADER.size
        header = _HEADER.pack(MAGIC, self.kind, length, *self.numbers, checksum, 0)[:_CHECKED]
        file.write(header + struct.pack("<I", zlib.crc32(header)))
        for part in self.parts:
            file.write(part.data)


def read_blocks(data: Bytes, unchecked: Collection[int] = ()) -> list[Block]:
    """All blocks of a file but one that the end of the file cuts off; damaged ones too.

    Behind a damaged header the next sound one is searched for.

    Args:
        unchecked: kinds whose payloads are not read, and so are taken as sound.
    """
    blocks: list[Block] = []
    at = 0
    while at + _HEADER.size <= len(data):
        header = _read_header(data, at)
        if header is None:
            stop = _next_header(data, at + 1)
            blocks.append(Block(None, (0, 0), None, at, stop))
            at = stop
            continue
        kind, length, numbers, checksum = header
        stop = at + _HEADER.size + length
        if stop > len(data):
            break
        payload = data[at + _HEADER.size : stop]
        sound = kind in unchecked or zlib.crc32(payload.data) == checksum
        blocks.append(Block(kind, numbers, payload if sound else None, at, stop))
        at = stop
    return blocks


def _read_header(data: Bytes, at: int) -> tuple[int, int, tuple[int, int], int] | None:
    raw = data[at : at + _HEADER.size].tobytes()
    magic, kind, length, first, second, checksum, own = _HEADER.unpack(raw)
    if magic != MAGIC or zlib.crc32(raw[:_CHECKED]) != own:
        return None
    return kind, length, (first, second), checksum


def _next_header(data: Bytes, at: int) -> int:
    """Where the next sound header begins, or the end of the file."""
    for start in range(at, len(data), _WINDOW):
        for place in np.flatnonzero(data[start : start + _WINDOW] == MAGIC[0]) + start:
            if place + _HEADER.size <= len(data) and _read_header(data, int(place)) is not None:
                return int(place)
    return len(data)
