"""The Sequences protocol: several sequences over one model, whose rows lie in one cache that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekv.backends.base import Backend
from edgekv.backends.kernel_names import Kernel
from edgekv.cache.rows import CacheRows, Layout
from edgekv.source import Array
from edgekv.tokenizer.language import Language


@dataclass(frozen=True)
class Piece:
    """Tokens to append to a sequence, from position `start` on, which is where its rows end."""

    sequence: int
    start: int
    tokens: Sequence[int]
    logits: bool  # whether the last token's are wanted


class Sequences(Protocol):
    """One model and one cache with rows of several sequences. Not thread-safe.

    Attributes:
        n_ctx: tokens that one sequence may hold.
        n_cells: tokens that the cache holds; sequences that share a row take one cell for it.
        n_parallel: sequences that may run side by side.
        n_sequences: sequences that may hold rows at a time, numbered from 0: those beyond n_parallel only keep them.
        n_batch: most tokens of one `run`.
        can_trim: whether the end of a sequence can be cut off; else only all of it can.
    """

    name: str
    kernel: Kernel
    n_ctx: int
    n_ctx_train: int | None
    n_cells: int
    n_vocab: int
    n_parallel: int
    n_sequences: int
    n_batch: int
    can_trim: bool

    def run(self, pieces: Sequence[Piece]) -> list[Array]:
        """Append pieces of different sequences in one batch; the logits (vocab,) of those that want them, in order.

        Raises:
            BackendError: the cache has no room for them, or the engine failed.
        """

    def share(self, source: int, target: int, start: int, stop: int) -> None:
        """Let `target`, which holds `start` rows, have rows [start, stop) of `source` too; nothing is copied."""

    def trim(self, sequence: int, n_past: int) -> None:
        """Drop a sequence's rows from position `n_past` on."""

    def layout(self) -> Layout:
        """What the cache holds of every token: the layout of what `save` returns and `load` takes.

        Raises:
            UnsupportedError: the engine keeps more of this model than rows of tokens.
        """

    def save(self, sequence: int, start: int = 0) -> CacheRows:
        """A copy of a sequence's rows from position `start` on; it holds one at least. Raises as `layout` does."""

    def load(self, sequence: int, rows: CacheRows) -> None:
        """Put rows of the engine's layout into an empty sequence, from position 0 on.

        Raises:
            BackendError: the cache has no room for them, or the engine refused them; the sequence is empty then.
        """

    def cache_nbytes(self) -> int:
        """Bytes that the engine allocated for its cache (all cells)."""

    def close(self) -> None:
        """Free the model."""


class OneSequence:
    """A Backend as Sequences of a single one."""

    n_parallel = n_sequences = 1

    def __init__(self, backend: Backend, language: Language, can_trim: bool = True) -> None:
        self.can_trim = can_trim
        self._backend, self._language = backend, language
        self.name, self.kernel = backend.name, backend.kernel
        self.n_ctx = self.n_cells = self.n_batch = backend.n_ctx
        self.n_ctx_train, self.n_vocab = backend.n_ctx_train, backend.n_vocab

    def run(self, pieces: Sequence[Piece]) -> list[Array]:
        (piece,) = pieces
        assert piece.start == self._backend.n_past
        logits = self._backend.prefill(piece.tokens)
        return [logits] if piece.logits else []

    def share(self, source: int, target: int, start: int, stop: int) -> None:
        raise AssertionError("there is one sequence")

    def trim(self, sequence: int, n_past: int) -> None:
        self._backend.trim(n_past)

    def layout(self) -> Layout:
        return self._backend.layout()

    def save(self, sequence: int, start: int = 0) -> CacheRows:
        return self._backend.save(start)

    def load(self, sequence: int, rows: CacheRows) -> None:
        self._backend.load(rows)

    def cache_nbytes(self) -> int:
        return self._backend.cache_nbytes()

    def language(self) -> Language:
        """The model's vocabulary."""
        return self._language

    def close(self) -> None:
        self._backend.close()


class SequenceCache:
    """One sequence of several, with the methods of a Backend that fill its cache; it is empty at first."""

    def __init__(self, engine: Sequences, sequence: int) -> None:
        self._engine, self._sequence = engine, sequence
        self.n_ctx, self.n_past = engine.n_ctx, 0

    def layout(self) -> Layout:
        return self._engine.layout()

    def prefill(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self._engine.n_batch):
            piece = tokens[start : start + self._engine.n_batch]
            self._engine.run([Piece(self._sequence, self.n_past, piece, logits=False)])
            self.n_past += len(piece)

    def save(self, start: int = 0) -> CacheRows:
        return self._engine.save(self._sequence, start)

    def load(self, rows: CacheRows) -> None:
        self._engine.trim(self._sequence, 0)
        if rows.n_tokens:
            self._engine.load(self._sequence, rows)
        self.n_past = rows.n_tokens
