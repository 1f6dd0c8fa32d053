"""Tokens in blocks, each named by a hash of itself and all before it, so that equal beginnings are found at once."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

BLOCK = 16  # tokens; a shorter beginning is not looked for


def block_hashes(tokens: Sequence[int], before: Sequence[bytes] = (), origin: bytes = b"") -> list[bytes]:
    """The hash of every full block and all before it, given those of the first blocks.

    Args:
        origin: tells rows apart that are not what a prefill of the same tokens computes.
    """
    hashes = list(before)
    for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        last = hashes[-1] if hashes else origin
        block = array("i", tokens[start : start + BLOCK]).tobytes()
        hashes.append(hashlib.blake2b(last + block, digest_size=16).digest())
    return hashes


class Indexed(Protocol):
    """Something with rows of tokens; `used_at` is higher the later it was used."""

    used_at: int

    @property
    def tokens(self) -> Sequence[int]: ...


T = TypeVar("T", bound=Indexed)


class BlockIndex(Generic[T]):
    """Finds what begins as a prompt does; `n_changes` tells whether it is what it was."""

    def __init__(self) -> None:
        self._by_block: defaultdict[bytes, set[T]] = defaultdict(set)
        self.n_changes = 0

    def __iter__(self) -> Iterator[bytes]:
        """The hashes of all blocks that something has."""
        return iter(self._by_block)

    def __len__(self) -> int:
        return len(self._by_block)

    def add(self, item: T, blocks: Sequence[bytes]) -> None:
        """Note blocks of an item."""
        self.n_changes += bool(blocks)
        for block in blocks:
            self._by_block[block].add(item)

    def discard(self, item: T, blocks: Sequence[bytes]) -> None:
        """Forget blocks of an item."""
        self.n_changes += bool(blocks)
        for block in blocks:
            self._by_block[block].discard(item)
            if not self._by_block[block]:
                del self._by_block[block]

    def having(self, block: bytes) -> T | None:
        """Something that has this block, and so all before it."""
        return next(iter(self._by_block.get(block, ())), None)

    def find(self, prompt: Sequence[int], blocks: Sequence[bytes]) -> tuple[T | None, int]:
        """The item that has most of the prompt's first tokens, and how many; a last block may go beyond the prompt."""
        found: set[T] = set()
        depth = 0
        for block in blocks:
            if not (having := self._by_block.get(block)):
                break
            found, depth = having, depth + BLOCK
        best, count = None, 0
        after = prompt[depth : depth + BLOCK]
        for item in found:
            pairs = zip(item.tokens[depth : depth + BLOCK], after, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if best is None or (same, item.used_at) > (count, best.used_at):
                best, count = item, same
        return best, min(depth + count, len(prompt)) if best else 0
