"""Files of cached rows: tokens, what the engine cached of them, and what their owner notes beside it.

Sessions, packs and what a server keeps on disk are such files (docs/sessions.md). The first block is the header; then
come blocks of rows, and after those of each save one block of notes, which makes them count. Rows from a token on take
the place of earlier ones.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from edgekv import __version__
from edgekv.cache.blocks import HEADER_NBYTES, MAGIC, Block, NewBlock, read_blocks
from edgekv.cache.rows import CacheRows, Layout, row_nbytes
from edgekv.documents import Document, SchemaError, decode, dumps, parse
from edgekv.errors import InputError, OutputError
from edgekv.files import atomic_path
from edgekv.models.identity import ModelIdentity

VERSION = 1
HEADER, ROWS, NOTES = 1, 2, 3  # kinds of blocks
TOKENS_PER_BLOCK = 256  # what a flipped bit costs, at least
MAX_JSON_NBYTES = 64 * 2**20
Format = Literal["edgekv.session", "edgekv.pack", "edgekv.prefix"]


class Header(Document, frozen=True):
    """What a file of rows belongs to."""

    format: Format
    version: int
    edgekv: str
    model: ModelIdentity
    layout: Layout

    @classmethod
    def of(cls, kind: Format, model: ModelIdentity, layout: Layout) -> Header:
        """The header of a new file."""
        return cls(kind, VERSION, __version__, model, layout)


@dataclass(frozen=True)
class _Piece:
    """Tokens `start` to `stop` of a block that begins at token `first`."""

    block: Block
    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """A file that was read and found sound as far as it is used.

    Attributes:
        tokens: those whose rows are there.
        notes: what the owner noted at the last save, as plain values.
        damage: what was wrong and is left out, in words; "" for nothing.
        end: where the next save is appended; None where the file has to be written anew.
        size: of the file.
    """

    header: Header
    tokens: list[int]
    notes: Any
    damage: str
    end: int | None
    size: int
    _pieces: tuple[_Piece, ...]

    def rows(self, count: int | None = None) -> CacheRows:
        """The rows of the first `count` tokens, or of all."""
        count = len(self.tokens) if count is None else count
        rows = CacheRows.empty(self.header.layout, count)
        for piece in _cut(self._pieces, count):
            assert piece.block.payload is not None
            stored = piece.block.numbers[1]
            block = CacheRows(self.header.layout, stored, piece.block.payload[4 * stored :])
            for target, source in zip(rows.planes(), block.planes(), strict=True):
                target[piece.start : piece.stop] = source[
                    piece.start - piece.first : piece.stop - piece.first
                ]
        return rows


def read_rows_file(path: Path, kind: Format, check_rows: bool = True) -> Stored:
    """Read a file of rows; it is mapped, so rows are copied once, when they are asked for.

    Args:
        check_rows: off to learn the tokens without reading all of the file; no rows may be taken then.

    Raises:
        InputError: it is none of this kind, of another version, or damaged past use.
    """
    what = kind.partition(".")[2]
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    blocks = read_blocks(np.frombuffer(mapped, np.uint8), () if check_rows else (ROWS,))
    if not blocks or blocks[0].kind != HEADER:
        reason = "its header is damaged" if mapped[:4] == MAGIC else f"it is no {what} of EdgeKV"
        raise InputError(f"{path}: {reason}; name another file, or remove it to begin anew")
    return _gather(path, kind, _header(path, kind, blocks[0]), blocks, size)


def _header(path: Path, kind: Format, block: Block) -> Header:
    what = kind.partition(".")[2]
    try:
        if block.payload is None:
            raise ValueError("a checksum does not fit")
        content = parse(block.payload[:MAX_JSON_NBYTES].tobytes())
        found = content.get("format"), content.get("version")
        if found[0] != kind:
            raise InputError(f"{path}: is {found[0]!r} and no {kind}; name a {what}")
        if found[1] != VERSION:
            raise InputError(
                f"{path}: is of version {found[1]}, and this EdgeKV reads {VERSION}; upgrade it, or make the {what} "
                "again"
            )
        header = decode(Header, content)
        if any(plane.nbytes < 1 for plane in header.layout):  # raises for unknown types and broken blocks
            raise ValueError("its rows are empty")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: its header is damaged ({error}); name another file, or remove it to begin anew"
        ) from None
    return header


def _gather(path: Path, kind: Format, header: Header, blocks: list[Block], size: int) -> Stored:
    """What counts in a file: rows up to the first damage, notes of the last save that is sound."""
    pieces: tuple[_Piece, ...] = ()
    saved: tuple[tuple[_Piece, ...], Any] | None = None
    damage, end = "", 0
    for block in blocks[1:]:
        if block.payload is None or block.kind not in (ROWS, NOTES):
            damage = damage or f"{_bytes_of(block)} do not fit their checksum"
        elif block.kind == NOTES:
            pieces = _cut(pieces, block.numbers[0])
            saved, end = (pieces, _notes(block)), block.stop
        elif not damage:  # rows behind a damage may go on from tokens that are lost
            try:
                pieces = _with_block(pieces, block, header.layout)
            except ValueError as error:
                damage = f"{_bytes_of(block)} {error}"
    if saved is None or saved[1] is None:
        what = kind.partition(".")[2]
        raise InputError(
            f"{path}: no save in it is whole ({damage or 'it ends early'}); make the {what} again"
        )
    kept, notes = saved
    torn = f"the last {size - end:,} bytes are of a save that did not finish" if size > end else ""
    tokens = [token for piece in kept for token in _tokens(piece)]
    return Stored(header, tokens, notes, damage or torn, None if damage else end, size, kept)


def _bytes_of(block: Block) -> str:
    return f"bytes {block.start:,} to {block.stop:,}"


def _notes(block: Block) -> Any:
    assert block.payload is not None
    with contextlib.suppress(SchemaError, RecursionError):
        return parse(block.payload[:MAX_JSON_NBYTES].tobytes())
    return None


def _with_block(pieces: tuple[_Piece, ...], block: Block, layout: Layout) -> tuple[_Piece, ...]:
    """The pieces once a block's rows have taken the place of all from its first token on."""
    first, count = block.numbers
    length = pieces[-1].stop if pieces else 0
    if first > length or not 0 < count <= TOKENS_PER_BLOCK:
        raise ValueError(f"hold rows of tokens {first} to {first + count}, which cannot be")
    assert block.payload is not None
    wanted = count * (4 + row_nbytes(layout))
    if len(block.payload) != wanted:
        raise ValueError(f"hold {len(block.payload)} bytes for {count} tokens, which take {wanted}")
    return (*_cut(pieces, first), _Piece(block, first, first, first + count))


def _cut(pieces: tuple[_Piece, ...], n_tokens: int) -> tuple[_Piece, ...]:
    """The pieces of the first tokens."""
    if not pieces or pieces[-1].stop <= n_tokens:
        return pieces
    return tuple(replace(piece, stop=min(piece.stop, n_tokens)) for piece in pieces if piece.start < n_tokens)


def _tokens(piece: _Piece) -> list[int]:
    assert piece.block.payload is not None
    ids = piece.block.payload[: 4 * piece.block.numbers[1]].view("<i4")
    return [int(token) for token in ids[piece.start - piece.first : piece.stop - piece.first]]


def write_rows_file(
    path: Path,
    header: Header,
    tokens: Sequence[int],
    rows: CacheRows,
    notes: Any,
    *,
    force: bool = True,
) -> int:
    """Write a whole file in the place of any other; returns its length.

    Raises:
        OutputError: the folder is missing or not writable, the disk is full, or the file exists without `force`.
    """
    with atomic_path(path, force) as partial, partial.open("wb") as file:
        write_rows(file, header, tokens, rows, notes)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def write_rows(file: IO[bytes], header: Header, tokens: Sequence[int], rows: CacheRows, notes: Any) -> None:
    """Write what a whole file holds, for others to read at once: it need not outlive the machine."""
    _json_block(HEADER, (0, 0), header).write(file)
    for block in _save(0, tokens, rows, notes):
        block.write(file)


def file_nbytes(header: Header | None, layout: Layout, n_tokens: int, notes: Any) -> int:
    """Bytes of a whole file, or without a header of what one save appends."""
    rows = n_tokens * (4 + row_nbytes(layout)) + -(-n_tokens // TOKENS_PER_BLOCK) * HEADER_NBYTES
    jsons = [_json_block(NOTES, (0, 0), notes)] + ([_json_block(HEADER, (0, 0), header)] if header else [])
    return rows + sum(block.nbytes for block in jsons)


def append_rows(path: Path, end: int, start: int, tokens: Sequence[int], rows: CacheRows, notes: Any) -> int:
    """Append a save to a file: rows of tokens from `start` on, in the place of those it has; returns its length.

    Killed at any moment, it leaves the file as it was before, or whole.

    Args:
        end: `Stored.end`, or what the last save returned.
        tokens: those from `start` on; all that the file has then.

    Raises:
        OutputError: the file is gone or not writable, or the disk is full; it is as it was then.
    """
    try:
        with path.open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            try:
                for block in _save(start, tokens, rows, notes):
                    block.write(file)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
            return file.tell()
    except OSError as error:
        raise OutputError(
            f"cannot save {path}: {error.strerror}; it is as it was before, free some space and try again"
        ) from error


def _save(start: int, tokens: Sequence[int], rows: CacheRows, notes: Any) -> Iterator[NewBlock]:
    assert rows.n_tokens == len(tokens)
    for first in range(0, len(tokens), TOKENS_PER_BLOCK):
        piece = rows.part(first, min(first + TOKENS_PER_BLOCK, len(tokens)))
        ids = np.array(tokens[first : first + TOKENS_PER_BLOCK], "<i4").view(np.uint8)
        yield NewBlock(ROWS, (start + first, piece.n_tokens), [ids, piece.data])
    yield _json_block(NOTES, (start + len(tokens), 0), notes)


def _json_block(kind: int, numbers: tuple[int, int], value: Any) -> NewBlock:
    text = dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return NewBlock(kind, numbers, [np.frombuffer(text, np.uint8)])
