"""Beginnings of prompts on disk: what the cache lets go of is found again, also by the next server.

Each file is one of rows (edgekv.cache.rows_file). Those of other models count towards the bytes too, and whichever was
used least lately is removed when room is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.cache.rows import CacheRows, Layout
from edgekv.cache.rows_file import Header, Stored, append_rows, file_nbytes, read_rows_file, write_rows_file
from edgekv.documents import Document
from edgekv.errors import BackendError, EdgeKVError, InputError
from edgekv.files import locked
from edgekv.models.identity import ModelIdentity
from edgekv.serve.engine.blocks import BlockIndex, block_hashes

MIN_TOKENS = 128  # fewer are sooner computed, and not worth a file
PAUSE_S = 60.0  # without writing, after the disk was full
SUFFIX, DAMAGED = ".prefix", ".damaged"
_NAME = re.compile(r"[0-9a-f]{16}\.(prefix|damaged)")


class NoNotes(Document, frozen=True):
    """There is nothing beside the rows."""


@dataclass(eq=False)
class Entry:
    """A file; one of another model, or damaged, has no tokens. `end` is where rows can be appended."""

    path: Path
    size: int
    used_at: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    blocks: list[bytes] = field(default_factory=list)
    end: int | None = None


class Disk:
    """A folder of beginnings, of which no other server may have the same; its files never take more than `n_bytes`.

    Attributes:
        index: its files by their blocks.
        used: bytes of all files.
        n_errors: how often writing failed.
        n_damaged: files that were found to be damaged.
        n_restored: tokens that were read.

    Raises:
        InputError: the folder cannot be made or read, or another server has it.
    """

    def __init__(self, folder: Path, n_bytes: int, model: ModelIdentity, layout: Layout) -> None:
        self._folder, self._n_bytes = folder, n_bytes
        self._header = Header.of("edgekv.prefix", model, layout)
        self.index: BlockIndex[Entry] = BlockIndex()
        self._entries: list[Entry] = []
        self._clock = itertools.count(1)
        self._paused_until = 0.0
        self.used = self.n_errors = self.n_damaged = self.n_restored = 0
        self._held = contextlib.ExitStack()
        try:
            folder.mkdir(exist_ok=True)
            self._held.enter_context(locked(folder, wait=False))
            self._open()
        except BlockingIOError:
            raise InputError(f"another server keeps its sessions in {folder}; name another folder") from None
        except OSError as error:
            raise InputError(
                f"sessions cannot be kept in {folder}: {error.strerror}; name another folder"
            ) from error

    def figures(self) -> dict[str, int]:
        """What the server tells of it."""
        return {
            "disk_bytes": self.used,
            "disk_errors": self.n_errors,
            "disk_damaged": self.n_damaged,
            "n_restored": self.n_restored,
        }

    def find(
        self, prompt: Sequence[int], blocks: Sequence[bytes], more_than: int
    ) -> tuple[Entry | None, int]:
        """The file that has most of a prompt's first tokens, and how many; none where it is hardly more than given."""
        entry, count = self.index.find(prompt, blocks)
        return (entry, count) if count >= more_than + MIN_TOKENS else (None, 0)

    def load(self, entry: Entry, count: int) -> CacheRows | None:
        """The first rows of a file; None where it is damaged, which sets it aside."""
        try:
            stored = read_rows_file(entry.path, "edgekv.prefix")
        except InputError:
            self.set_aside(entry)
            return None
        if stored.end is None or not self._is_ours(stored) or stored.tokens != list(entry.tokens):
            self.set_aside(entry)
            return None
        self._touch(entry)
        self.n_restored += count
        return stored.rows(count)

    def save(self, tokens: Sequence[int], blocks: Sequence[bytes], rows: Callable[[int], CacheRows]) -> None:
        """Write rows of tokens, if enough of them are not there yet; a full disk is survived without them.

        Args:
            rows: gives those from a token on.
        """
        entry, known = self.index.find(tokens, blocks)
        if entry is not None:
            self._touch(entry)
        if len(tokens) - known < MIN_TOKENS or time.monotonic() < self._paused_until:
            return
        try:
            if entry is not None and known == len(entry.tokens) and entry.end is not None:
                self._append(entry, tokens, rows)
            else:
                self._write(tokens, rows)
        except (EdgeKVError, OSError) as error:
            self.n_errors += 1
            if not isinstance(error, BackendError):
                self._paused_until = time.monotonic() + PAUSE_S

    def set_aside(self, entry: Entry) -> None:
        """Leave a file out that cannot be used; it goes first when room is needed."""
        self.n_damaged += 1
        self.index.discard(entry, entry.blocks)
        entry.tokens, entry.blocks, entry.used_at = array("i"), [], 0
        with contextlib.suppress(OSError):
            entry.path = entry.path.rename(entry.path.with_suffix(DAMAGED))

    def _open(self) -> None:
        for partial in self._folder.glob(f".*{SUFFIX}.*.partial"):
            partial.unlink()  # nobody else writes here
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            entry = Entry(path, path.stat().st_size, next(self._clock))
            self._entries.append(entry)
            self.used += entry.size
            if path.suffix == SUFFIX:
                self._read(entry)
            else:
                entry.used_at = 0
        self._make_room(0)

    def _read(self, entry: Entry) -> None:
        """Note the tokens of a file; its rows are checked when they are loaded."""
        try:
            stored = read_rows_file(entry.path, "edgekv.prefix", check_rows=False)
        except InputError:
            self.set_aside(entry)
            return
        if self._is_ours(stored):
            entry.end = stored.end
            self._note(entry, stored.tokens)

    def _is_ours(self, stored: Stored) -> bool:
        return (stored.header.model, stored.header.layout) == (self._header.model, self._header.layout)

    def _note(self, entry: Entry, tokens: Sequence[int]) -> None:
        before = len(entry.blocks)
        entry.tokens = array("i", tokens)
        entry.blocks = block_hashes(entry.tokens, entry.blocks)
        self.index.add(entry, entry.blocks[before:])

    def _append(self, entry: Entry, tokens: Sequence[int], rows: Callable[[int], CacheRows]) -> None:
        assert entry.end is not None
        start = len(entry.tokens)
        size = entry.end + file_nbytes(None, self._header.layout, len(tokens) - start, NoNotes())
        if not self._make_room(size - entry.size, keep=entry):
            return
        entry.end = append_rows(entry.path, entry.end, start, tokens[start:], rows(start), NoNotes())
        self._resize(entry, entry.end)
        self._note(entry, tokens)

    def _write(self, tokens: Sequence[int], rows: Callable[[int], CacheRows]) -> None:
        size = file_nbytes(self._header, self._header.layout, len(tokens), NoNotes())
        if not self._make_room(size):
            return
        path = self._folder / f"{secrets.token_hex(8)}{SUFFIX}"
        end = write_rows_file(path, self._header, tokens, rows(0), NoNotes())
        entry = Entry(path, 0, next(self._clock), end=end)
        self._entries.append(entry)
        self._resize(entry, end)
        self._note(entry, tokens)

    def _make_room(self, count: int, keep: Entry | None = None) -> bool:
        """Remove what was used least lately until `count` more bytes may be written; whether they may."""
        if count + (keep.size if keep else 0) > self._n_bytes:
            return False
        while self.used + count > self._n_bytes:
            oldest = min((each for each in self._entries if each is not keep), key=lambda each: each.used_at)
            oldest.path.unlink(missing_ok=True)
            self.index.discard(oldest, oldest.blocks)
            self._entries.remove(oldest)
            self.used -= oldest.size
        return True

    def _resize(self, entry: Entry, size: int) -> None:
        self.used += size - entry.size
        entry.size = size

    def _touch(self, entry: Entry) -> None:
        entry.used_at = next(self._clock)
        with contextlib.suppress(OSError):
            os.utime(entry.path)
