"""What a forward pass shows of its queries, for policies that go by them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.policies.base import Need, Rows
from edgekv.source import Array

WINDOW = 64  # queries that are kept, of the last tokens (SnapKV, arXiv 2404.14469)
SKIPPED = 4  # first tokens, whose queries are outliers
_CHUNK = 64  # queries whose attention is computed at once


# How many queries, their sum (H, K) and the sum of their outer products (H, K, K); 0.0 before the first.
Statistics = tuple[int, NDArray[np.float64] | float, NDArray[np.float64] | float]


class Observer:
    """Collects the last queries of each layer, and the attention that each row got so far.

    Args:
        needs: "queries", "attention", "probe", or several; nothing else is collected.
    """

    def __init__(self, needs: Collection[Need], n_layers: int) -> None:
        self._needs, self._n_layers = needs, n_layers
        self.forget()

    def forget(self) -> None:
        """Begin anew, as the cache does when another text comes."""
        n_layers = self._n_layers
        self._queries: list[Array | None] = [None] * n_layers
        self._statistics: list[Statistics] = [(0, 0.0, 0.0)] * n_layers
        self._sums: list[Array] = [np.zeros((1, 0), np.float32)] * n_layers  # (G, S)
        self._seen: list[Array] = [np.zeros((1, 0), np.float32)] * n_layers  # (G, S): queries that saw a row

    def see(self, layer: int, queries: Array, keys: Array | None = None, cap: float = 0.0) -> None:
        """Note queries (T, H, K), scaled, of the last T of the S tokens whose keys (G, S, K) are cached.

        Without keys there is no attention to be seen.
        """
        if "queries" in self._needs:
            before = self._queries[layer]
            joined = queries if before is None else np.concatenate([before, queries])
            self._queries[layer] = joined[-WINDOW:].copy()
        if "attention" in self._needs:
            assert keys is not None
            self._add_attention(layer, queries, keys, cap)

    @property
    def wants_statistics(self) -> bool:
        """Whether `add` is to be called."""
        return "probe" in self._needs

    def add(self, layer: int, queries: Array, first: int) -> None:
        """Count queries (T, H, K) without RoPE, scaled, of tokens from position `first` on."""
        counted = queries[max(SKIPPED - first, 0) :].swapaxes(0, 1).astype(np.float64)  # (H, T, K)
        n, total, squares = self._statistics[layer]
        self._statistics[layer] = (
            n + counted.shape[1],
            total + counted.sum(axis=1),
            squares + counted.swapaxes(1, 2) @ counted,
        )

    def statistics(self, layer: int) -> tuple[Array, Array]:
        """Mean (H, K) and covariance (H, K, K) of the queries that were added."""
        n, total, squares = self._statistics[layer]
        mean = np.asarray(total) / max(n, 1)
        covariance = squares / max(n, 1) - mean[:, :, None] * mean[:, None, :]
        return np.asarray(mean, np.float32), np.asarray(covariance, np.float32)

    def queries(self, layer: int) -> Array | None:
        """(W, H, K) of the last tokens."""
        return self._queries[layer]

    def attention(self, layer: int) -> Array:
        """(G, S): the mean over the queries that saw a row."""
        return np.asarray(self._sums[layer] / np.maximum(self._seen[layer], np.float32(1)))

    def keep(self, layer: int, rows: Rows) -> None:
        """Forget all but these rows (G, n)."""
        if self._sums[layer].shape[-1]:
            self._sums[layer] = np.take_along_axis(self._sums[layer], rows, axis=1)
            self._seen[layer] = np.take_along_axis(self._seen[layer], rows, axis=1)

    def trim(self, layer: int, n_rows: int) -> None:
        """Forget rows from `n_rows` on."""
        self._sums[layer], self._seen[layer] = self._sums[layer][:, :n_rows], self._seen[layer][:, :n_rows]

    def _add_attention(self, layer: int, queries: Array, keys: Array, cap: float) -> None:
        n_new, n_rows = len(queries), keys.shape[1]
        new = n_rows - self._sums[layer].shape[1]
        grown = [
            np.concatenate(
                [np.broadcast_to(old, (len(keys), n_rows - new)), np.zeros((len(keys), new))], axis=1
            )
            for old in (self._sums[layer], self._seen[layer])
        ]
        sums, seen = (np.asarray(array, np.float32) for array in grown)
        for start in range(0, n_new, _CHUNK):
            chunk = queries[start : start + _CHUNK]
            weights = attention_of(chunk, keys[:, : n_rows - n_new + start + len(chunk)], cap)
            sums[:, : weights.shape[-1]] += weights.sum(axis=1)
        visible = n_rows - n_new + 1 + np.arange(n_new)  # rows that each query sees
        seen += (np.arange(n_rows)[:, None] < visible).sum(axis=1)
        self._sums[layer], self._seen[layer] = sums, seen


def attention_of(queries: Array, keys: Array, cap: float = 0.0) -> Array:
    """Causal attention of scaled queries (W, H, K), those of the last W of S tokens, to keys (G, S, K): (G, W, S).

    The mean over the H/G query heads that share a KV head.
    """
    n_new, n_heads, width = queries.shape
    n_groups, n_rows, _ = keys.shape
    by_group = queries.reshape(n_new, n_groups, n_heads // n_groups, width)
    scores = np.einsum("wghk,gsk->ghws", by_group, keys, optimize=True)
    if cap:
        scores = cap * np.tanh(scores / cap)
    hidden = np.arange(n_rows) > (n_rows - n_new + np.arange(n_new))[:, None]
    scores[..., hidden] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.asarray(scores.mean(axis=1), np.float32)
