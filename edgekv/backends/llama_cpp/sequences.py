"""llama.cpp as Sequences: a unified cache, whose cells may belong to several sequences at once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekv.backends.llama_cpp.context import LlamaContext
from edgekv.backends.llama_cpp.library import LOG, logits_rows
from edgekv.backends.llama_cpp.state import StateFormat
from edgekv.backends.sequences import Piece
from edgekv.cache.rows import CacheRows, Layout
from edgekv.errors import BackendError
from edgekv.source import Array

MAX_SEQUENCES = (
    256  # LLAMA_MAX_SEQ: the cache knows these ids whatever n_seq_max is, a batch only those below it
)


class LlamaSequences(LlamaContext):
    """llama.cpp as Sequences: a LlamaContext of `n_parallel` sequences, with its other arguments and errors.

    The rows of up to 256 sequences lie in n_parallel x n_ctx cells. Layers with a window keep all of them, as
    later prompts begin anywhere. Models with a recurrent state cannot share it or go back in it, so theirs is dropped
    whole.
    """

    def __init__(
        self, path: Path, n_parallel: int, *, n_ctx: int | None, cache_type: str, n_threads: int | None
    ) -> None:
        super().__init__(
            path,
            n_ctx=n_ctx,
            cache_type=cache_type,
            n_threads=n_threads,
            n_sequences=n_parallel,
            n_outputs=n_parallel,
            keeps_all=True,
        )
        api = self._api
        self.n_parallel = n_parallel
        self.n_cells, self.n_ctx = self.n_ctx, self.n_ctx // n_parallel
        self.n_batch = int(api.llama_n_batch(self._context))
        recurrent = api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model)
        self.can_trim = not recurrent
        self.n_sequences = n_parallel if recurrent else MAX_SEQUENCES
        size = self.n_batch
        self._tokens, self._positions = (np.zeros(size, np.int32) for _ in range(2))
        self._ids, self._counts = np.zeros(size, np.int32), np.ones(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        pointer, ids = ctypes.POINTER(ctypes.c_int32), self._ids
        addresses = range(ids.ctypes.data, ids.ctypes.data + ids.nbytes, ids.itemsize)
        self._id_pointers = (pointer * size)(*(ctypes.cast(address, pointer) for address in addresses))

    def run(self, pieces: Sequence[Piece]) -> list[Array]:
        rows, count = [], 0
        for piece in pieces:
            end = count + len(piece.tokens)
            assert count < end <= self.n_batch, (count, end)
            self._tokens[count:end] = piece.tokens
            self._positions[count:end] = np.arange(piece.start, piece.start + len(piece.tokens))
            self._ids[count:end] = piece.sequence
            self._wanted[count:end] = 0
            if piece.logits:
                self._wanted[end - 1] = 1
                rows.append(end - 1)
            count = end
        batch = self._api.llama_batch(
            n_tokens=count,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._id_pointers,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        LOG.clear()
        if status := self._api.llama_decode(self._context, batch):
            raise BackendError(f"llama.cpp failed with status {status} on {count} tokens: {LOG.cause()}")
        return [logits_rows(self._context, row, 1, self.n_vocab).reshape(-1).copy() for row in rows]

    def layout(self) -> Layout:
        return self._state_format.layout

    def save(self, sequence: int, start: int = 0) -> CacheRows:
        return self._read_rows(sequence, start)[1]

    def load(self, sequence: int, rows: CacheRows) -> None:
        assert rows.layout == self.layout()
        self._write_rows(self._state_format, sequence, rows)

    def share(self, source: int, target: int, start: int, stop: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def trim(self, sequence: int, n_past: int) -> None:
        assert self.can_trim or n_past == 0
        if not self._api.llama_memory_seq_rm(self._memory, sequence, n_past, -1):
            raise BackendError(f"llama.cpp cannot trim a sequence of this model's cache to {n_past} tokens")

    @functools.cached_property
    def _state_format(self) -> StateFormat:
        """How this context writes its states: read off sequence 0, which gets a token for it if it has none."""
        empty = int(self._api.llama_memory_seq_pos_max(self._memory, 0)) < 0
        if empty:
            self.run([Piece(0, 0, [0], logits=False)])
        try:
            return self._read_rows(0)[0]
        finally:
            if empty:
                self.trim(0, 0)
