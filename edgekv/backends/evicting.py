"""A Backend whose cache has a fixed size: rows leave it, by a policy, as tokens come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgekv.backends.base import DEFAULT_N_CTX, Backend, EvictableBackend, require_free
from edgekv.cache.policies.base import LayerView, Need, Policy, Rows, chosen
from edgekv.cache.policies.budgets import by_entropy, pyramid
from edgekv.cache.policies.merge import merged
from edgekv.cache.policies.named import policy_named
from edgekv.cache.policies.settings import Eviction, require_possible
from edgekv.cache.rows import CacheRows, Layout
from edgekv.errors import InputError, UnsupportedError
from edgekv.source import Array


class EvictingBackend(Backend):
    """Another Backend, opened with `eviction.n_cells` cells, as one of `n_ctx` positions.

    A prompt runs in slices, and rows leave before one that would not fit; while tokens are decoded, whenever
    `eviction.every` of them came. Rows keep their positions: nothing is shifted, and what is beyond the length that
    a model was trained for stays so however few rows are left.

    Args:
        n_ctx: positions; by default the trained length.

    Raises:
        InputError: the budget is impossible, or the policy unknown.
        UnsupportedError: the engine cannot evict, or not show the policy what it needs.
    """

    def __init__(self, backend: EvictableBackend, eviction: Eviction, n_ctx: int | None = None) -> None:
        require_possible(eviction)
        self._backend, self._eviction = backend, eviction
        self._policy: Policy = policy_named(eviction.policy)
        if eviction.layers != "uniform" and not backend.layers_differ:
            raise UnsupportedError(
                f"{backend.name} keeps as many rows in each layer; leave --layers out, or take --backend reference"
            )
        also: frozenset[Need] = frozenset({"attention"} if eviction.layers == "entropy" else ())
        backend.require_evictable(self._policy.needs | also)
        self._n_left = eviction.budget  # behind the last eviction, in the layer that has most
        self.name, self.kernel = backend.name, backend.kernel
        self.n_ctx_train, self.n_vocab = backend.n_ctx_train, backend.n_vocab
        most = backend.max_positions
        if n_ctx is not None and most is not None and n_ctx > most:
            raise InputError(f"the model has {most} positions, not {n_ctx}; use --ctx-size {most} or less")
        self.n_ctx = n_ctx or backend.n_ctx_train or DEFAULT_N_CTX

    @property
    def backend(self) -> EvictableBackend:
        """The engine itself."""
        return self._backend

    @property
    def n_past(self) -> int:  # type: ignore[override]
        return self._backend.n_past

    @property
    def n_rows(self) -> int:
        return self._backend.n_rows

    def prefill(self, tokens: Sequence[int]) -> Array:
        require_free(self.n_past, len(tokens), self.n_ctx)
        for piece in self._slices(tokens):
            logits = self._backend.prefill(piece)
        return logits

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        require_free(self.n_past, len(tokens), self.n_ctx)
        return np.concatenate([self._backend.prefill_all(piece) for piece in self._slices(tokens)])

    def decode(self, token: int) -> Array:
        require_free(self.n_past, 1, self.n_ctx)
        if self.n_rows >= max(self._n_left, self._eviction.budget) + self._eviction.every:
            self.evict(self._eviction.budget)
        return self._backend.decode(token)

    def trim(self, n_past: int) -> None:
        self._backend.trim(n_past)

    def evict(self, n_rows: int) -> None:
        """Evict rows now, so that `n_rows` are left in each layer; does nothing where there are no more."""
        if n_rows >= self.n_rows:
            return
        if self._backend.merges:
            scores = merged(self._policy.scores(view, n_rows) for view in self._backend.views())
            self._backend.keep([self._chosen(scores, n_rows)])
        else:
            views = list(self._backend.views())
            wanted = [
                (view, min(n, view.n_rows))
                for view, n in zip(views, self._budgets(views, n_rows), strict=True)
            ]
            self._backend.keep([self._chosen(self._policy.scores(view, n), n) for view, n in wanted])
        self._n_left = self.n_rows

    def evict_to_budget(self) -> None:
        """Evict rows now, so that no more than the budget are left in each layer."""
        self.evict(self._eviction.budget)

    def _chosen(self, scores: Array, n_rows: int) -> Rows:
        return chosen(scores, n_rows, self._eviction.sinks, self._eviction.recent)

    def _budgets(self, views: Sequence[LayerView], n_rows: int) -> list[int]:
        """Rows that each layer is to keep."""
        if self._eviction.layers == "uniform":
            return [n_rows] * len(views)
        if self._eviction.layers == "pyramid":
            return pyramid(n_rows, self.n_rows, len(views))
        return by_entropy(
            n_rows, self.n_rows, [view.attention for view in views if view.attention is not None]
        )

    def layout(self) -> Layout:
        raise _not_whole()

    def save(self, start: int = 0) -> CacheRows:
        raise _not_whole()

    def load(self, rows: CacheRows) -> None:
        raise _not_whole()

    def cache_nbytes(self) -> int:
        return self._backend.cache_nbytes()

    def close(self) -> None:
        self._backend.close()

    def _slices(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """The pieces of a prompt, with room made for each before it is given out."""
        size, room = self._eviction.slice_size, self._eviction.n_cells
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            if self.n_rows + len(piece) > room:
                self.evict(self._eviction.budget)
            yield piece


def evicts(backend: Backend) -> bool:
    """Whether rows leave its cache before the end."""
    return isinstance(backend, EvictingBackend)


def evict_now(backend: Backend) -> None:
    """Cut a cache of fixed size to its budget; nothing happens to others."""
    if isinstance(backend, EvictingBackend):
        backend.evict_to_budget()


def _not_whole() -> UnsupportedError:
    return UnsupportedError(
        "a cache of fixed size lets go of tokens, and sessions and packs hold all of them; chat without them, or leave "
        "the budget out"
    )
