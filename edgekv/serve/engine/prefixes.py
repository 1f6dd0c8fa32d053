"""Which tokens the cache holds, and what of it a prompt begins with: blocks by their hash, least used out first."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgekv.backends.sequences import Sequences

BLOCK = 16  # tokens; a shorter beginning is not looked for
MIN_TRIM = 256  # tokens cut off at once from what is least used, so that not each token looks for room


@dataclass(eq=False)
class Rows:
    """The rows of one sequence: its tokens, a serial number for each one's cell, and a hash per full block."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    used_at: int = 0


def block_hashes(tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
    """The hash of every full block and all before it, given those of the first blocks."""
    hashes = list(before)
    for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        last = hashes[-1] if hashes else b""
        block = array("i", tokens[start : start + BLOCK]).tobytes()
        hashes.append(hashlib.blake2b(last + block, digest_size=16).digest())
    return hashes


class Prefixes:
    """Sequences that run, and those that are kept because a later prompt may begin as they do.

    All cells of the cache are allocated when the model is opened. Sequences that run take at most n_parallel x n_ctx,
    which is all of them; what they leave free holds rows that are kept, and is taken back for them when needed.
    """

    def __init__(self, engine: Sequences) -> None:
        self._engine = engine
        self._slots = list(range(engine.n_parallel))  # free sequences that can run
        self._shelves = list(range(engine.n_parallel, engine.n_sequences))  # free ones that only keep rows
        self._running: list[Rows] = []
        self._kept: list[Rows] = []
        self._by_block: defaultdict[bytes, set[Rows]] = defaultdict(set)
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

    def begin(self, prompt: Sequence[int], blocks: Sequence[bytes]) -> Rows:
        """A running sequence that holds as much of the prompt, but for its last token, as the cache does."""
        source, count = self._find(prompt, blocks)
        if source in self._kept and (count == len(source.tokens) or not self._slots):
            rows = source
            self._kept.remove(rows)
            self._cut(rows, count)
            if rows.sequence >= self._engine.n_parallel:
                self._move(rows, self._slots)
        else:
            if not self._slots:
                self._drop_oldest()
            rows = Rows(self._slots.pop())
            if source is not None:
                self._share(source, rows, count)
        self._running.append(rows)
        return rows

    def grow(self, rows: Rows, prompt: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Give a running sequence what others have computed of its prompt since."""
        source, count = self._find(prompt, blocks)
        if source is not None and count > len(rows.tokens):
            self._share(source, rows, count)

    def make_room(self, count: int) -> None:
        """Free cells for `count` more tokens of running sequences: the ends of what was used least lately go first."""
        while self.used_cells + count > self._engine.n_cells and self._kept:
            oldest = min(self._kept, key=lambda rows: rows.used_at)
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
        self._index(rows)

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

    def _find(self, prompt: Sequence[int], blocks: Sequence[bytes]) -> tuple[Rows | None, int]:
        """The sequence that has most of the prompt's tokens but the last, and how many."""
        found: set[Rows] = set()
        depth = 0
        for block in blocks:
            if not (having := self._by_block.get(block)):
                break
            found, depth = having, depth + BLOCK
        best, count = None, 0
        after = prompt[depth:-1][:BLOCK]
        for rows in found:
            pairs = zip(rows.tokens[depth : depth + BLOCK], after, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if best is None or (same, rows.used_at) > (count, best.used_at):
                best, count = rows, same
        return best, min(depth + count, len(prompt) - 1) if best else 0

    def _share(self, source: Rows, target: Rows, count: int) -> None:
        source.used_at = next(self._clock)
        start = len(target.tokens)
        self._engine.share(source.sequence, target.sequence, start, count)
        target.tokens += source.tokens[start:count]
        target.cells += source.cells[start:count]
        self._owners.update(source.cells[start:count])
        self._index(target)

    def _index(self, rows: Rows) -> None:
        before = len(rows.blocks)
        rows.blocks = block_hashes(rows.tokens, rows.blocks)
        for block in rows.blocks[before:]:
            self._by_block[block].add(rows)

    def _cut(self, rows: Rows, count: int) -> None:
        """Drop a sequence's rows from position `count` on."""
        if count < len(rows.tokens):
            self._engine.trim(rows.sequence, count)
        for block in rows.blocks[count // BLOCK :]:
            self._by_block[block].discard(rows)
            if not self._by_block[block]:
                del self._by_block[block]
        for cell in rows.cells[count:]:
            self._owners[cell] -= 1
            if not self._owners[cell]:
                del self._owners[cell]
        del rows.tokens[count:], rows.cells[count:], rows.blocks[count // BLOCK :]

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
        self._kept.remove(oldest)
        self._release(oldest)
