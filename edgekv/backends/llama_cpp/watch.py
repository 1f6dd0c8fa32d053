"""Queries as llama.cpp computes them, for policies that go by them: a callback sees each node of its graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

from edgekv.backends.llama_cpp.importance import F32, Tensor, require_known_layout, tensor_view
from edgekv.cache.policies.base import Need
from edgekv.cache.policies.observe import Observer
from edgekv.errors import BackendError
from edgekv.reference.probe import without_rope
from edgekv.source import Array
from edgekv.spec import AttentionSpec

# What every graph of llama.cpp calls the queries of a layer (llm_graph_context::cb): projected, normed and last
# rotated, and of a latent absorbed.
_QUERIES = re.compile(rb"Qcur-(\d+)")


class QueryWatch:
    """Collects the queries of one sequence; `watch` is a ggml_backend_sched_eval_callback.

    Attributes:
        first: the position of the first token that is computed next.
        error: an exception of the callback, which cannot be raised through native code.
    """

    def __init__(self) -> None:
        self.observer: Observer | None = None
        self.first = 0
        self.error: Exception | None = None
        self._attentions: Sequence[AttentionSpec] = ()
        self._turn: Sequence[Array | None] = ()
        self._checked = False
        self._newest: dict[int, Array] = {}

    def begin(
        self, needs: Collection[Need], attentions: Sequence[AttentionSpec], turn: Sequence[Array | None]
    ) -> Observer:
        """Collect what is needed, in the Observer that is returned.

        Args:
            turn: what turns each layer's keys before they are rounded, (K, K) or None.
        """
        self.observer = Observer(needs, len(attentions))
        self._attentions, self._turn = attentions, turn
        return self.observer

    def forget(self) -> None:
        """Begin anew, as the cache does when another text comes."""
        if self.observer is not None:
            self.observer.forget()

    def watch(self, address: int, ask: bool, _: object) -> bool:
        """Called twice per graph node: whether its data are wanted (`ask`), then once they are computed."""
        if self.observer is None:
            return not ask
        try:
            if not self._checked:
                require_known_layout(address)
                self._checked = True
            node = Tensor.from_address(address)
            found = _QUERIES.fullmatch(node.name)
            if found is None or node.type != F32:
                return not ask
            layer = int(found[1])
            if node.ne[1] != self._attentions[layer].n_heads or node.ne[3] != 1:  # not split into heads yet
                return not ask
            if not ask:
                self._newest[layer] = tensor_view(node, np.float32)[0].copy()  # (T, H, K)
            return True
        except Exception as error:
            self.error = error
            return False

    def finish(self) -> None:
        """Note the queries of the graph that was computed.

        Raises:
            BackendError: the callback failed.
        """
        if self.error is not None:
            raise BackendError(f"llama.cpp's queries cannot be read: {self.error}")
        if self.observer is None:
            return
        for layer, queries in self._newest.items():
            spec = self._attentions[layer]
            scaled = np.asarray(queries * np.float32(spec.score_scale), np.float32)
            turn = self._turn[layer]
            self.observer.see(layer, scaled if turn is None else scaled @ turn)
            if self.observer.wants_statistics:
                self.observer.add(layer, without_rope(scaled, self.first, spec), self.first)
        self._newest.clear()
