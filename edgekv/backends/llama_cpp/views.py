"""What policies see of the rows that llama.cpp stores, and of its queries."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekv.backends.base import require_no_window
from edgekv.backends.llama_cpp.state import StoredRows
from edgekv.backends.llama_cpp.watch import QueryWatch
from edgekv.cache.policies.base import LayerView, Need, Probe
from edgekv.cache.policies.norms import norm_factors, quick_norms
from edgekv.cache.policies.observe import Observer
from edgekv.cache.rows import Bytes, Plane, exact_values
from edgekv.reference.output_maps import output_maps
from edgekv.reference.probe import probe_ahead
from edgekv.source import Array
from edgekv.spec import GQA, MLA, AttentionSpec

WATCHED: frozenset[Need] = frozenset({"queries", "probe"})  # by a QueryWatch


class StoredNorms:
    """Norms of the rows' values behind the output matrix, computed once for each row.

    Args:
        factors: of each layer, from edgekv.cache.policies.norms.norm_factors.
    """

    def __init__(self, factors: Sequence[Array], attentions: Sequence[AttentionSpec]) -> None:
        self._factors, self._attentions = factors, attentions
        self._positions = np.zeros(0, np.int32)
        self._norms = [np.zeros((len(layer), 0), np.float32) for layer in factors]

    def trim(self, n_past: int) -> None:
        """Forget those from position `n_past` on."""
        known = int(np.searchsorted(self._positions, n_past))
        self._positions = self._positions[:known]
        self._norms = [norms[:, :known] for norms in self._norms]

    def of(self, rows: StoredRows) -> list[Array]:
        """(G, S) of each layer; of those that were known before, some may be gone, and others come behind them."""
        start = (
            int(np.searchsorted(rows.positions, self._positions[-1], "right")) if len(self._positions) else 0
        )
        known = np.searchsorted(self._positions, rows.positions[:start])
        self._norms = [
            np.concatenate([norms[:, known], self._new(rows, layer, start)], axis=1)
            for layer, norms in enumerate(self._norms)
        ]
        self._positions = rows.positions
        return self._norms

    def _new(self, rows: StoredRows, layer: int, start: int) -> Array:
        """(G, S - start) of the rows from `start` on."""
        attention = self._attentions[layer]
        plane = layer + len(self._attentions) if isinstance(attention, GQA) else layer
        values = _heads(rows.plane(plane, start), rows.layout[plane], attention)
        if isinstance(attention, MLA):
            values = values[..., : attention.kv_lora_rank]
        return quick_norms(values, self._factors[layer])


class StateViews:
    """Makes LayerViews of what llama.cpp stores of one model's sequence.

    Args:
        needs: the fields of LayerView that policies may need.

    Attributes:
        norms: of the rows, where policies need them.

    Raises:
        ModelFileError: the file is malformed.
        UnsupportedError: EdgeKV cannot read the model, or it has windows.
    """

    def __init__(self, path: Path, needs: Collection[Need]) -> None:
        # gguf and safetensors: too much for the many engines that evict nothing
        from edgekv.models.open import open_model

        source = open_model(path)
        self._attentions = [layer.attention for layer in source.spec.layers]
        require_no_window(attention.window for attention in self._attentions)
        self._factors = [
            norm_factors(output_maps(source, layer), _n_groups(attention))
            for layer, attention in enumerate(self._attentions)
            if "norms" in needs
        ]
        self._observer: Observer | None = None
        self._turns: list[Array | None] = []
        self.norms: StoredNorms | None = None

    def begin(self, needs: Collection[Need], encodings: tuple[str, str], watch: QueryWatch | None) -> None:
        """Begin to collect what is needed of a context.

        Args:
            encodings: Plane.encoding of its keys and values.
            watch: which it was opened with; needed for queries.
        """
        self._turns = [_turn(attention, encodings[0]) for attention in self._attentions]
        if "norms" in needs:
            factors = [
                _turned(layer, attention, encodings[1])
                for layer, attention in zip(self._factors, self._attentions, strict=True)
            ]
            self.norms = StoredNorms(factors, self._attentions)
        if not WATCHED.isdisjoint(needs):
            assert watch is not None
            self._observer = watch.begin(needs, self._attentions, self._turns)

    def of(self, rows: StoredRows, n_past: int, mass: Array | None) -> Iterator[LayerView]:
        """A view of each layer.

        Args:
            mass: the attention that each row got so far, summed over heads and queries, (layers, S).
        """
        norms = self.norms.of(rows) if self.norms else None
        n_queries = n_past - rows.positions  # that saw a row: all from its own on
        for layer, attention in enumerate(self._attentions):
            keys = _heads(rows.plane(layer), rows.layout[layer], attention)
            view = LayerView(len(keys), keys.shape[1], keys, norms[layer] if norms else None)
            if mass is not None:
                mean = mass[layer] / (attention.n_heads * n_queries)
                view = replace(view, attention=np.broadcast_to(mean.astype(np.float32), keys.shape[:2]))
            yield self._shown(view, layer, n_past) if self._observer else view

    def _shown(self, view: LayerView, layer: int, position: int) -> LayerView:
        """The view with what was seen of the queries."""
        observer = self._observer
        assert observer is not None
        probe = None
        if observer.wants_statistics:
            probe = probe_ahead(*observer.statistics(layer), position, self._attentions[layer])
            turn = self._turns[layer]
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


def _turned(factors: Array, attention: AttentionSpec, encoding: str) -> Array:
    """Factors for values as llama.cpp turned them."""
    if encoding == "hadamard" and isinstance(attention, GQA):
        return np.asarray(hadamard(attention.head_dim, 64) @ factors)
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
