"""Which tokens the cache holds, and what of it a prompt begins with: blocks by their hash, least used out first."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgekv.backends.sequences import Sequences
from edgekv.cache.rows import CacheRows
from edgekv.errors import BackendError
from edgekv.serve.engine.blocks import BLOCK, BlockIndex, block_hashes
from edgekv.serve.engine.disk import Disk
from edgekv.serve.engine.packs import PackFolder

MIN_TRIM = 256  # tokens cut off at once from what is least used, so that not each token looks for room


@dataclass(eq=False)
class Rows:
    """The rows of one sequence: its tokens, a serial number for each one's cell, and a hash per full block.

    Attributes:
        origin: as in edgekv.serve.engine.blocks.block_hashes.
        n_judged: tokens that the disk has, or was found not to be worth.
    """

    sequence: int
    origin: bytes = b""
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    used_at: int = 0
    n_judged: int = 0


class Store(Protocol):
    """Where rows lie outside of the cache: the disk, or a folder of packs. What it finds is its own kind of entry."""

    index: BlockIndex[Any]

    def find(self, prompt: Sequence[int], blocks: Sequence[bytes], more_than: int) -> tuple[Any, int]:
        """What has most of a prompt's first tokens, and how many; None where it is hardly more than given."""

    def load(self, entry: Any, count: int) -> CacheRows | None:
        """The first rows of an entry; None where it is damaged, which sets it aside."""

    def set_aside(self, entry: Any) -> None:
        """Find an entry no more."""


class Prefixes:
    """Sequences that run, and those that are kept because a later prompt may begin as they do.

    All cells of the cache are allocated when the model is opened. Sequences that run take at most n_parallel x n_ctx,
    which is all of them; what they leave free holds rows that are kept, and is taken back for them when needed.
    What is kept goes to the disk, if there is one, before it is taken back, or earlier when nothing else is to do.
    """

    def __init__(self, engine: Sequences, disk: Disk | None = None, packs: PackFolder | None = None) -> None:
        self._engine, self._disk = engine, disk
        self._stores: list[Store] = [store for store in (disk, packs) if store is not None]
        self._slots = list(range(engine.n_parallel))  # free sequences that can run
        self._shelves = list(range(engine.n_parallel, engine.n_sequences))  # free ones that only keep rows
        self._running: list[Rows] = []
        self._kept: list[Rows] = []
        self._index: BlockIndex[Rows] = BlockIndex()
        self._owners: Counter[int] = Counter()  # sequences that have a cell, by the cell's serial number
        self._serial, self._clock = itertools.count(), itertools.count(1)

    @property
    def used_cells(self) -> int:
        """Cells that hold a row of some sequence."""
        return len(self._owners)

    @property
    def kept_cells(self) -> int:
        """Cells that no running sequence has."""
        running = {cell for rows in self._running for cell in rows.cells}
        return len(self._owners) - len(running)

    def begin(self, prompt: Sequence[int], blocks: Sequence[bytes], origin: bytes = b"") -> Rows:
        """A running sequence that holds as much of the prompt, but for its last token, as the cache or a store does."""
        source, count = self._index.find(prompt[:-1], blocks)
        store, entry, there = self._stored(prompt, blocks, count, origin)
        if store is not None:
            return self._restore(store, entry, prompt[:there]) or self.begin(prompt, blocks)
        if source in self._kept and (count == len(source.tokens) or not self._slots):
            rows = source
            self._kept.remove(rows)
            self._cut(rows, count)
            if rows.sequence >= self._engine.n_parallel:
                self._move(rows, self._slots)
        else:
            rows = Rows(self._free_slot(), origin)
            if source is not None:
                self._share(source, rows, count)
        self._running.append(rows)
        return rows

    def held(self, prompt: Sequence[int], blocks: Sequence[bytes], origin: bytes = b"") -> int:
        """How many of a prompt's first tokens `begin` would find."""
        _, count = self._index.find(prompt[:-1], blocks)
        return max(count, self._stored(prompt, blocks, count, origin)[2])

    def blocks(self) -> set[bytes]:
        """The hashes of all blocks whose rows `rows_of` gives."""
        return set(self._index).union(*(store.index for store in self._stores))

    @property
    def n_changes(self) -> int:
        """Tells whether `blocks` is what it was."""
        return self._index.n_changes + sum(store.index.n_changes for store in self._stores)

    def rows_of(self, block: bytes, count: int) -> tuple[list[int], CacheRows] | None:
        """The tokens and rows of a block and all before it, `count` in all; None where nothing has them."""
        if (rows := self._index.having(block)) is not None and count <= len(rows.tokens):
            return rows.tokens[:count], self._engine.save(rows.sequence).part(0, count)
        for store in self._stores:
            if (entry := store.index.having(block)) is not None and count <= len(entry.tokens):
                tokens = list(entry.tokens[:count])  # before it is set aside
                if (found := store.load(entry, count)) is not None:
                    return tokens, found
        return None

    def adopt(self, tokens: Sequence[int], found: CacheRows) -> None:
        """Keep rows that were computed elsewhere; a sequence has to be free.

        Raises:
            BackendError: the engine refused them.
        """
        self.finish(self._loaded(tokens, found))

    def place(self, rows: Rows, tokens: Sequence[int], put: Callable[[int], object]) -> None:
        """Give a running sequence rows of tokens by `put`, which puts them into an empty sequence.

        Raises:
            EdgeKVError: that of `put`; the sequence is ended then.
        """
        self._cut(rows, 0)
        self.make_room(len(tokens))
        try:
            put(rows.sequence)
        except BaseException:
            self.finish(rows, keep=False)
            raise
        self.appended(rows, tokens)

    def grow(self, rows: Rows, prompt: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Give a running sequence what others have computed of its prompt since."""
        source, count = self._index.find(prompt[:-1], blocks)
        if source is not None and count > len(rows.tokens):
            self._share(source, rows, count)

    def make_room(self, count: int) -> None:
        """Free cells for `count` more tokens of running sequences: the ends of what was used least lately go first."""
        while self.used_cells + count > self._engine.n_cells and self._kept:
            oldest = min(self._kept, key=lambda rows: rows.used_at)
            self._save(oldest)
            left = len(oldest.tokens) - max(MIN_TRIM, count)
            if left < BLOCK or not self._engine.can_trim:
                self._kept.remove(oldest)
                self._release(oldest)
            else:
                self._cut(oldest, left)

    def appended(self, rows: Rows, tokens: Sequence[int]) -> None:
        """Note tokens that have been run."""
        cells = [next(self._serial) for _ in tokens]
        rows.tokens += tokens
        rows.cells += cells
        self._owners.update(cells)
        self._note_blocks(rows)

    def finish(self, rows: Rows, keep: bool = True) -> None:
        """End a running sequence; its rows are kept while there is room, unless a failure made them worthless."""
        self._running.remove(rows)
        if keep and self._engine.can_trim and len(rows.tokens) >= BLOCK:
            rows.used_at = next(self._clock)
            if self._engine.n_sequences > self._engine.n_parallel:
                if not self._shelves:
                    self._drop_oldest()
                self._move(rows, self._shelves)
            self._kept.append(rows)
        else:
            self._release(rows)

    def save_one(self) -> bool:
        """Put one of those that are kept on the disk; whether there was one that is not there yet."""
        for rows in self._kept:
            if rows.n_judged < len(rows.tokens):
                self._save(rows)
                return True
        return False

    def save_all(self) -> None:
        """Put all on the disk, those that run too."""
        for rows in [*self._kept, *self._running]:
            self._save(rows)

    def _save(self, rows: Rows) -> None:
        if self._disk is not None and rows.n_judged < len(rows.tokens) and not rows.origin:
            self._disk.save(rows.tokens, rows.blocks, lambda start: self._engine.save(rows.sequence, start))
        rows.n_judged = len(rows.tokens)

    def _stored(
        self, prompt: Sequence[int], blocks: Sequence[bytes], more_than: int, origin: bytes
    ) -> tuple[Store | None, Any, int]:
        """The store and its entry that has most of a prompt, and how many tokens; no store has rows that were moved."""
        best: tuple[Store | None, Any, int] = None, None, 0
        for store in self._stores if not origin else []:
            entry, there = store.find(prompt[:-1], blocks, more_than)
            if there > best[2]:
                best = store, entry, there
        return best

    def _restore(self, store: Store, entry: Any, tokens: Sequence[int]) -> Rows | None:
        """A running sequence with the first rows of an entry; None where it is damaged."""
        if (found := store.load(entry, len(tokens))) is None:
            return None
        try:
            rows = self._loaded(tokens, found)
        except BackendError:
            store.set_aside(entry)
            return None
        rows.n_judged = len(tokens)
        return rows

    def _loaded(self, tokens: Sequence[int], found: CacheRows) -> Rows:
        """A running sequence with these rows; raises BackendError if the engine refuses them."""
        rows = Rows(self._free_slot())
        self.make_room(len(tokens))
        try:
            self._engine.load(rows.sequence, found)
        except BackendError:
            self._give_back(rows.sequence)
            raise
        self.appended(rows, tokens)
        self._running.append(rows)
        return rows

    def _free_slot(self) -> int:
        if not self._slots:
            self._drop_oldest()
        return self._slots.pop()

    def _share(self, source: Rows, target: Rows, count: int) -> None:
        source.used_at = next(self._clock)
        start = len(target.tokens)
        self._engine.share(source.sequence, target.sequence, start, count)
        target.tokens += source.tokens[start:count]
        target.cells += source.cells[start:count]
        self._owners.update(source.cells[start:count])
        self._note_blocks(target)

    def _note_blocks(self, rows: Rows) -> None:
        before = len(rows.blocks)
        rows.blocks = block_hashes(rows.tokens, rows.blocks, rows.origin)
        self._index.add(rows, rows.blocks[before:])

    def _cut(self, rows: Rows, count: int) -> None:
        """Drop a sequence's rows from position `count` on."""
        if count < len(rows.tokens):
            self._engine.trim(rows.sequence, count)
        self._index.discard(rows, rows.blocks[count // BLOCK :])
        for cell in rows.cells[count:]:
            self._owners[cell] -= 1
            if not self._owners[cell]:
                del self._owners[cell]
        del rows.tokens[count:], rows.cells[count:], rows.blocks[count // BLOCK :]
        rows.n_judged = min(rows.n_judged, count)

    def _move(self, rows: Rows, free: list[int]) -> None:
        """Give rows to another sequence; nothing is copied."""
        before, rows.sequence = rows.sequence, free.pop()
        self._engine.share(before, rows.sequence, 0, len(rows.tokens))
        self._give_back(before)

    def _release(self, rows: Rows) -> None:
        self._cut(rows, 0)
        self._give_back(rows.sequence)

    def _give_back(self, sequence: int) -> None:
        self._engine.trim(sequence, 0)  # of a batch that failed there may be rows that nobody noted
        (self._slots if sequence < self._engine.n_parallel else self._shelves).append(sequence)

    def _drop_oldest(self) -> None:
        oldest = min(self._kept, key=lambda rows: rows.used_at)
        self._save(oldest)
        self._kept.remove(oldest)
        self._release(oldest)
