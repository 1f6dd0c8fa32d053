"""The KV cache of the reference model: plain float32 arrays, one pair per layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.policies.base import Rows, n_tail
from edgekv.cache.policies.observe import Observer
from edgekv.cache.rows import CacheRows, Layout, Plane
from edgekv.source import Array
from edgekv.spec import MLA, ModelSpec


class KVCache:
    """Keys and values of up to n_ctx tokens, preallocated; of one sequence, or of B that advance together.

    For GQA a layer keeps k and v, each (G, n_ctx, K). For MLA it keeps one array of rows
    (1, n_ctx, R + P), the latent and the rope key, and v is a view of the first R values.
    With `n_sequences` each array has a leading axis of that length, B. Rows of new tokens are always (N, ...): the
    T tokens of the first sequence, then those of the second, and so on.

    Attributes:
        n_past: the position of the next token; each layer holds as many rows, unless some were evicted.
        dense_from: every token from this position on has a row in each layer.
        observer: is shown the queries of new tokens, for policies that evict by them.
    """

    def __init__(self, spec: ModelSpec, n_ctx: int, n_sequences: int | None = None) -> None:
        self.n_ctx = n_ctx
        self.n_past = self.dense_from = 0
        self.observer: Observer | None = None
        self._evicted = [0] * spec.n_layers
        self.batch = () if n_sequences is None else (n_sequences,)
        self._k: list[Array] = []
        self._v: list[Array] = []
        for layer in spec.layers:
            attention = layer.attention
            if isinstance(attention, MLA):
                rows = np.zeros((*self.batch, 1, n_ctx, attention.cache_values), np.float32)
                self._k.append(rows)
                self._v.append(rows[..., : attention.kv_lora_rank])
            else:
                shape = (*self.batch, attention.n_kv_heads, n_ctx, attention.head_dim)
                self._k.append(np.zeros(shape, np.float32))
                self._v.append(np.zeros(shape, np.float32))

    def positions(self, n_rows: int) -> NDArray[np.int64]:
        """The positions of N rows of new tokens, (N,)."""
        n_sequences = self.batch[0] if self.batch else 1
        return np.tile(np.arange(self.n_past, self.n_past + n_rows // n_sequences), n_sequences)

    def by_sequence(self, rows: Array) -> Array:
        """Rows (N, ...) as (T, ...), or (B, T, ...) of B sequences."""
        return rows.reshape(*self.batch, -1, *rows.shape[1:])

    def append(self, layer: int, k: Array, v: Array | None) -> tuple[Array, Array]:
        """Store k (N, G, width) and v (N, G, V) behind the n_past tokens; None for MLA, whose v is in k.

        Returns all cached k ([B,] G, S, width) and v ([B,] G, S, V), the new ones included. The tokens count
        only after `advance`.
        """
        keys = self.by_sequence(k).swapaxes(-3, -2)
        start = self.n_rows(layer)
        stop = start + keys.shape[-2]
        assert stop <= self.n_ctx, (stop, self.n_ctx)
        self._k[layer][..., start:stop, :] = keys
        if v is not None:
            self._v[layer][..., start:stop, :] = self.by_sequence(v).swapaxes(-3, -2)
        return self._k[layer][..., :stop, :], self._v[layer][..., :stop, :]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` that every layer has appended to each sequence."""
        self.n_past += n_tokens

    def n_rows(self, layer: int) -> int:
        """Rows of a layer."""
        return self.n_past - self._evicted[layer]

    def trim(self, n_past: int) -> None:
        """Forget every token from position `n_past` on, or all of them, where evicted ones would be missed."""
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        if n_past <= self.dense_from and n_past < self.n_past:
            n_past = self.dense_from = 0
            self._evicted = [0] * len(self._evicted)
        self.n_past = n_past
        if self.observer is not None and not n_past:
            self.observer.forget()
        elif self.observer is not None:
            for layer in range(len(self._k)):
                self.observer.trim(layer, self.n_rows(layer))

    def keep(self, layer: int, rows: Rows) -> None:
        """Drop every row of a layer but those at these indices (G, n), which differ by head; ascending."""
        assert not self.batch
        tail = n_tail(rows, self.n_rows(layer))
        self.dense_from = max(self.dense_from, self.n_past - tail)
        n_rows = rows.shape[-1]
        for array in self._arrays(layer):
            array[:, :n_rows] = np.take_along_axis(array, rows[:, :, None], axis=1)
        self._evicted[layer] = self.n_past - n_rows
        if self.observer is not None:
            self.observer.keep(layer, rows)

    def cached(self, layer: int) -> tuple[Array, Array]:
        """A layer's cached k ([B,] G, S, width) and v ([B,] G, S, V)."""
        stop = self.n_rows(layer)
        return self._k[layer][..., :stop, :], self._v[layer][..., :stop, :]

    @property
    def layout(self) -> Layout:
        """What it holds of every token."""
        return tuple(Plane(name, "f32", array.shape[-3] * array.shape[-1]) for name, array in self._stored())

    def save(self, start: int) -> CacheRows:
        """A copy of the rows of tokens `start` to `n_past` of the one sequence."""
        assert not any(self._evicted)
        rows = CacheRows.empty(self.layout, self.n_past - start)
        for target, (_, array) in zip(rows.planes(), self._stored(), strict=True):
            by_token = array[:, start : self.n_past].swapaxes(0, 1)
            target[:] = np.ascontiguousarray(by_token).view(np.uint8).reshape(target.shape)
        return rows

    def load(self, rows: CacheRows) -> None:
        """Put rows of this layout in the place of all that is cached."""
        assert not self.batch
        assert rows.layout == self.layout
        self.trim(0)
        assert rows.n_tokens <= self.n_ctx
        for stored, (_, array) in zip(rows.planes(), self._stored(), strict=True):
            by_token = stored.view(np.float32).reshape(rows.n_tokens, array.shape[0], array.shape[2])
            array[:, : rows.n_tokens] = by_token.swapaxes(0, 1)
        self.n_past = rows.n_tokens

    def _stored(self) -> list[tuple[str, Array]]:
        """The arrays by name, keys first, without values that are views of keys."""
        arrays = [self._arrays(layer) for layer in range(len(self._k))]
        keys = [(f"{i}.key", pair[0]) for i, pair in enumerate(arrays)]
        return keys + [(f"{i}.value", pair[1]) for i, pair in enumerate(arrays) if len(pair) > 1]

    def _arrays(self, layer: int) -> tuple[Array, ...]:
        """A layer's arrays: keys and values, or the rows that hold both."""
        k, v = self._k[layer], self._v[layer]
        return (k,) if np.shares_memory(k, v) else (k, v)

    @property
    def nbytes(self) -> int:
        """Bytes allocated; a v that is a view of k counts once."""
        return sum(array.nbytes for _, array in self._stored())
