"""What eviction needs of llama.cpp: which positions its cells hold, and what policies see of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import require_no_window
from edgekv.backends.llama_cpp.state import read_cells
from edgekv.backends.llama_cpp.watch import QueryWatch
from edgekv.cache.policies.base import LayerView, Need, Probe, Rows, n_tail
from edgekv.cache.policies.norms import norm_factors, quick_norms
from edgekv.cache.rows import Bytes, Plane, exact_values
from edgekv.errors import UnsupportedError
from edgekv.reference.output_maps import output_maps
from edgekv.reference.probe import probe_ahead
from edgekv.source import Array
from edgekv.spec import GQA, AttentionSpec

# For these a context has to be opened with a QueryWatch.
WATCHED: frozenset[Need] = frozenset({"queries", "probe"})
SHOWN: frozenset[Need] = frozenset({"keys", "norms", "queries", "probe"})


class CachedPositions:
    """The positions of a sequence's rows, ascending; those from `dense_from` on have no gap."""

    def __init__(self) -> None:
        self._kept: NDArray[np.int64] = np.zeros(0, np.int64)  # behind the last eviction
        self._since = self.dense_from = 0  # every position from here on came later

    def all(self, n_past: int) -> NDArray[np.int64]:
        """The positions, (S,), of which the last is n_past - 1."""
        return np.concatenate([self._kept, np.arange(self._since, n_past)])

    def count(self, n_past: int) -> int:
        """S."""
        return len(self._kept) + n_past - self._since

    def keep(self, rows: Rows, n_past: int) -> NDArray[np.int64]:
        """Note that only these rows are left; the positions of the others."""
        positions = self.all(n_past)
        self.dense_from = max(self.dense_from, n_past - n_tail(rows, len(positions)))
        self._kept, self._since = positions[rows], n_past
        return np.delete(positions, rows)

    def trim(self, n_past: int) -> None:
        """Note that the end is cut off, or all of it."""
        if not n_past:
            self.dense_from = 0
        self._kept = self._kept[self._kept < n_past]
        self._since = min(self._since, n_past)


def runs(positions: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ascending positions as ranges [start, stop)."""
    edges = np.flatnonzero(np.diff(positions) > 1) + 1
    for start, stop in itertools.pairwise([0, *edges.tolist(), len(positions)]):
        yield int(positions[start]), int(positions[stop - 1]) + 1


class StateViews:
    """Makes LayerViews of the states of one model's sequence.

    Raises:
        UnsupportedError: llama.cpp does not show what is needed, or EdgeKV cannot read the model.
    """

    def __init__(
        self, path: Path, needs: Collection[Need], encodings: tuple[str, str], watch: QueryWatch | None
    ) -> None:
        if missing := sorted(set(needs) - SHOWN):
            raise UnsupportedError(
                f"llama.cpp does not show the {' and '.join(missing)} of its flash attention; take another policy: "
                "streaming, knorm, keydiff, snapkv, tova, expected, or one of these with critical- in front"
            )
        self._encodings, self._watch = encodings, watch
        # gguf and safetensors: too much for the many engines that evict nothing
        from edgekv.models.open import open_model

        source = open_model(path)
        self._attentions = [layer.attention for layer in source.spec.layers]
        require_no_window(attention.window for attention in self._attentions)
        self._factors = [
            _factors(output_maps(source, layer), attention, encodings[1])
            for layer, attention in enumerate(self._attentions)
            if "norms" in needs
        ]
        if not WATCHED.isdisjoint(needs):
            assert watch is not None
            watch.begin(needs, self._attentions, [_turn(a, encodings[0]) for a in self._attentions])

    def of(self, state: Bytes, position: int) -> Iterator[LayerView]:
        """A view of each layer, its rows by position, of a state as llama.cpp writes it.

        Args:
            position: of the next token.
        """
        try:
            form, positions, planes = read_cells(state, self._encodings)
        except (ValueError, KeyError) as error:
            raise UnsupportedError(
                f"llama.cpp keeps more of this model than one plain cache ({error}); leave the budget out"
            ) from error
        order = np.argsort(positions)
        for layer, attention in enumerate(self._attentions):
            keys = _heads(planes[layer][order], form.layout[layer], attention)
            norms = None
            if self._factors:
                at = layer + len(self._attentions)
                values = (
                    _heads(planes[at][order], form.layout[at], attention)
                    if isinstance(attention, GQA)
                    else keys[..., : attention.kv_lora_rank]
                )
                norms = quick_norms(values, self._factors[layer])
            yield self._shown(LayerView(len(keys), keys.shape[1], keys, norms), layer, position)

    def _shown(self, view: LayerView, layer: int, position: int) -> LayerView:
        """The view with what was seen of the queries."""
        observer = self._watch.observer if self._watch else None
        if observer is None:
            return view
        probe = None
        if observer.wants_statistics:
            probe = probe_ahead(*observer.statistics(layer), position, self._attentions[layer])
            turn = _turn(self._attentions[layer], self._encodings[0])
            if turn is not None and probe.covariance is not None:
                covariance = turn.T @ probe.covariance @ turn
                probe = Probe(probe.mean @ turn, np.asarray(covariance, np.float32))
        return replace(view, queries=observer.queries(layer), probe=probe)


def _heads(stored: Bytes, plane: Plane, attention: AttentionSpec) -> Array:
    """Stored rows (S, bytes) as (G, S, K)."""
    values = exact_values(stored, plane)
    return values.reshape(len(values), _n_groups(attention), -1).swapaxes(0, 1)


def _n_groups(attention: AttentionSpec) -> int:
    return attention.n_kv_heads if isinstance(attention, GQA) else 1


def _factors(maps: Array, attention: AttentionSpec, encoding: str) -> Array:
    factors = norm_factors(maps, _n_groups(attention))
    if encoding == "hadamard" and isinstance(attention, GQA):
        factors = hadamard(attention.head_dim, 64) @ factors
    return factors


def _turn(attention: AttentionSpec, encoding: str) -> Array | None:
    """What llama.cpp turns keys by, and queries with them."""
    if encoding != "hadamard" or not isinstance(attention, GQA):
        return None
    return hadamard(attention.head_dim, attention.head_dim & -attention.head_dim)


def hadamard(width: int, size: int) -> Array:
    """The symmetric matrix by which llama.cpp turns each `size` values of a head before it rounds them.

    Powers of two from 64 on: of keys the largest that divides the head, of values 64 (src/llama-kv-cache.cpp,
    build_input_k_rot and build_input_v_rot).
    """
    block = np.ones((1, 1), np.float32)
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    return np.asarray(np.kron(np.eye(width // size), block / np.sqrt(size)), np.float32)
