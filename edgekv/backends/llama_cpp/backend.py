"""llama.cpp as a Backend, on the low-level functions of llama-cpp-python.

The high-level `llama_cpp.Llama` keeps float32 scores for every token of a batch (262 MB at 512 x 128256) and
turns flash attention off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import (
    EvictableBackend,
    Interrupted,
    require_loadable,
    require_no_window,
    require_room,
)
from edgekv.backends.llama_cpp.cells import rows_in_place
from edgekv.backends.llama_cpp.context import LlamaContext
from edgekv.backends.llama_cpp.kernel.mass import AttentionMass
from edgekv.backends.llama_cpp.library import LOG, logits_rows
from edgekv.backends.llama_cpp.positions import CachedPositions, runs
from edgekv.backends.llama_cpp.state import StateFormat, StoredRows
from edgekv.backends.llama_cpp.views import WATCHED, StateViews
from edgekv.backends.llama_cpp.watch import QueryWatch
from edgekv.cache.policies.base import LayerView, Need, Rows
from edgekv.cache.rows import CacheRows, Layout
from edgekv.errors import BackendError, UnsupportedError
from edgekv.source import Array

# Rows of logits computed at once when every token's are wanted: 64 rows are 10 % slower than 256, more rows
# only take memory (two float32 buffers of rows x vocab).
LOGITS_ROWS = 128


class LlamaCppBackend(LlamaContext, EvictableBackend):
    """llama.cpp as a Backend: a LlamaContext of one sequence, with its arguments and errors.

    A call in progress ends with Interrupted when the first byte of the abort flag is set. Policies can go
    by what it `shows`, and by nothing else.
    """

    merges = True  # llama_memory_seq_rm drops a position in all layers

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        cache_type: str = "f16",
        n_threads: int | None = None,
        abort_flag: ctypes.Array[ctypes.c_char] | None = None,
        shows: Collection[Need] = (),
    ) -> None:
        # Before the model is loaded: what reading the file takes is free again by then.
        self._views = StateViews(path, shows) if shows else None
        super().__init__(
            path,
            n_ctx=n_ctx,
            cache_type=cache_type,
            n_threads=n_threads,
            n_sequences=1,
            n_outputs=LOGITS_ROWS,
            keeps_all=False,
            abort_flag=abort_flag,
            watch=None if WATCHED.isdisjoint(shows) else QueryWatch(),
        )
        self._format: StateFormat | None = None
        self._positions = CachedPositions()
        self._mass: AttentionMass | None = None
        self.n_past = 0
        self._token = (ctypes.c_int32 * 1)()
        self._one_token = self._api.llama_batch(n_tokens=1, token=self._token)

    @property
    def n_rows(self) -> int:
        return self._positions.count(self.n_past)

    def prefill(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        for start in range(0, len(tokens), self.n_ubatch):
            self._run(self._batch(tokens[start : start + self.n_ubatch], every=False))
        return self._last_logits()

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        logits = np.empty((len(tokens), self.n_vocab), np.float32)
        rows = min(LOGITS_ROWS, self.n_ubatch)
        for start in range(0, len(tokens), rows):
            piece = tokens[start : start + rows]
            self._run(self._batch(piece, every=True))
            logits[start : start + len(piece)] = logits_rows(self._context, 0, len(piece), self.n_vocab)
        return logits

    def decode(self, token: int) -> Array:
        require_room(self, 1)
        self._token[0] = int(token)
        self._run(self._one_token)
        return self._last_logits()

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        if n_past == self.n_past:
            return
        api, memory = self._api, self._memory
        if self._mass:
            self._mass.rows[:, self._cells()[self._positions.all(self.n_past) >= n_past]] = 0
        gone = bool(n_past) and n_past <= self._positions.dense_from
        if gone or not (self._remembers(n_past) and api.llama_memory_seq_rm(memory, 0, n_past, -1)):
            api.llama_memory_clear(memory, False)
            n_past = 0
        self._positions.trim(n_past)
        self.n_past = n_past
        if self._mass and not n_past:
            self._mass.rows[:] = 0
        if self._views and self._views.norms:
            self._views.norms.trim(n_past)
        if self._watch is not None and not n_past:
            self._watch.forget()

    def require_evictable(self, needs: Collection[Need]) -> None:
        api = self._api
        if api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model):
            raise UnsupportedError(
                "a recurrent state has no rows that could be evicted; leave the budget out"
            )
        require_no_window([self._window])
        if "attention" in needs:
            self.collect_attention(True)
        if self._views:
            self._views.begin(needs, self._encodings, self._watch)

    def views(self) -> Iterator[LayerView]:
        if self._views is None:  # a policy that looks at nothing
            yield LayerView(1, self.n_rows)
        else:
            rows = self._stored_rows()
            mass = self._mass.rows[:, self._cells(rows)] if self._mass else None
            yield from self._views.of(rows, self.n_past, mass)

    def keep(self, rows: Sequence[Rows]) -> None:
        assert rows[0][-1] == self.n_rows - 1
        if self._mass:
            self._mass.rows[:, np.delete(self._cells(), rows[0])] = 0
        for start, stop in runs(self._positions.keep(rows[0], self.n_past)):
            self._api.llama_memory_seq_rm(self._memory, 0, start, stop)

    def layout(self) -> Layout:
        return self._state_format().layout

    def save(self, start: int = 0) -> CacheRows:
        assert 0 <= start <= self.n_past, (start, self.n_past)
        if start == self.n_past:
            return CacheRows.empty(self.layout(), 0)
        return self._read_rows(0, start)[1]

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        self.trim(0)
        if rows.n_tokens:
            self._write_rows(self._state_format(), 0, rows)
            self.n_past = rows.n_tokens

    def collect_attention(self, on: bool) -> None:
        self._mass = None
        if not on:
            return
        if self.kernel == "stock":
            super().collect_attention(on)
        if self._window:
            raise UnsupportedError(
                "layers with a sliding window let go of tokens by themselves, and attention is told by token"
            )
        self._mass = AttentionMass(int(self._api.llama_model_n_layer(self._model)), self.n_ctx)

    def attention_mass(self) -> Array:
        return self._mass.rows[:, self._cells()] if self._mass else super().attention_mass()

    def _cells(self, rows: StoredRows | None = None) -> NDArray[np.int64]:
        """The cells of the cached rows by position; `rows` are they, where they have been asked for."""
        if not self.n_rows:
            return np.zeros(0, np.int64)
        rows = rows or self._stored_rows()
        if not rows.are_cells:
            raise UnsupportedError(
                "this llama.cpp does not tell the cells of its cache, by which attention is collected; "
                "pip install llama-cpp-python==0.3.36"
            )
        return rows.places

    def _stored_rows(self) -> StoredRows:
        """The cached rows where they lie, or of a copy where llama.cpp does not show that."""
        nbytes = int(self._api.llama_state_seq_get_size(self._context, 0))
        try:
            found = rows_in_place(self._memory, nbytes, self._encodings)
            return found or StoredRows.of_state(self._state(0), self._encodings)
        except (ValueError, KeyError) as error:
            raise UnsupportedError(
                f"llama.cpp keeps more of this model than one plain cache ({error}); leave the budget out"
            ) from error

    def _remembers(self, n_past: int) -> bool:
        """Whether the cache holds all that a token at position `n_past` sees.

        llama.cpp does not look: it would trim to fewer cells than the window, without a word, and number new
        tokens from the last cell that is left. Of layers with a window it keeps the cells from pos_min on.
        """
        seen = max(n_past - max(self._window - 1, 1), 0)  # the oldest position, and no less than one of them
        return n_past > 0 and int(self._api.llama_memory_seq_pos_min(self._memory, 0)) <= seen

    def _state_format(self) -> StateFormat:
        """How this context writes its states: read off the first one, of one token if the cache is empty."""
        if self._format is None:
            if empty := not self.n_past:
                self.decode(0)
            try:
                self._format = self._read_rows(0)[0]
            finally:
                if empty:
                    self.trim(0)
        return self._format

    def _batch(self, tokens: Sequence[int], every: bool) -> Any:
        """A llama_batch that continues sequence 0, with logits of every token or of the last."""
        count = len(tokens)
        ids = (ctypes.c_int32 * count).from_buffer_copy(np.asarray(tokens, np.int32).tobytes())
        batch = self._api.llama_batch(n_tokens=count, token=ids)
        if every:
            batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        return batch

    def _run(self, batch: Any) -> None:
        if self._watch is not None:
            self._watch.first = self.n_past
        with self._mass.collecting() if self._mass else nullcontext():
            status = self._api.llama_decode(self._context, batch)
        if self._watch is not None:
            self._watch.finish()
        if status == 0:
            self.n_past += batch.n_tokens
            return
        self.n_past = self._api.llama_memory_seq_pos_max(self._memory, 0) + 1
        self._positions.trim(self.n_past)
        if status == 2:  # the abort callback
            self._abort[0] = b"\0"
            raise Interrupted
        raise BackendError(
            f"llama.cpp failed with status {status} at token {self.n_past} of {self.n_ctx}: {LOG.cause()}"
        )

    def _last_logits(self) -> Array:
        return logits_rows(self._context, -1, 1, self.n_vocab).reshape(-1).copy()
