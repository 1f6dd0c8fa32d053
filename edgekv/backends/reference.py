"""The NumPy reference as a Backend: slow, in float32, the standard that other engines are compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from edgekv.backends.base import EvictableBackend, require_loadable, require_no_window, require_room
from edgekv.cache.policies.base import LayerView, Need, Probe, Rows
from edgekv.cache.policies.norms import output_norms
from edgekv.cache.policies.observe import Observer
from edgekv.cache.rows import CacheRows, Layout
from edgekv.errors import UnsupportedError
from edgekv.reference.attention import MLAForm
from edgekv.reference.model import ReferenceModel
from edgekv.reference.output_maps import output_maps
from edgekv.reference.probe import probe_ahead
from edgekv.source import Array, TensorSource


class ReferenceBackend(EvictableBackend):
    """edgekv.reference.model.ReferenceModel as a Backend; the cache is float32."""

    name = "reference"
    merges = False
    layers_differ = True

    def __init__(self, source: TensorSource, n_ctx: int, form: MLAForm = "absorbed") -> None:
        self._source, self._form = source, form
        self._model = ReferenceModel(source, form)
        self._cache = self._model.new_cache(n_ctx)
        self._needs: Collection[Need] = ()
        self.n_ctx, self.n_past = n_ctx, 0
        self.n_ctx_train = source.spec.context_length
        self.n_vocab = source.spec.vocab

    @property
    def n_rows(self) -> int:
        return max(self._cache.n_rows(layer) for layer in range(self._source.spec.n_layers))

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens)[-1])

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens))

    def trim(self, n_past: int) -> None:
        self._cache.trim(n_past)
        self.n_past = self._cache.n_past

    def layout(self) -> Layout:
        return self._cache.layout

    def save(self, start: int = 0) -> CacheRows:
        return self._cache.save(start)

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        self._cache.load(rows)
        self.n_past = rows.n_tokens

    def require_evictable(self, needs: Collection[Need]) -> None:
        require_no_window(layer.attention.window for layer in self._source.spec.layers)
        if not {"queries", "attention", "probe"}.isdisjoint(needs):
            if self._form != "absorbed":
                raise UnsupportedError("the naive form of MLA has no absorbed queries; take the absorbed one")
            self._cache.observer = Observer(needs, self._source.spec.n_layers)
        self._needs = needs

    def views(self) -> Iterator[LayerView]:
        observer = self._cache.observer
        for layer in range(self._source.spec.n_layers):
            keys, values = self._cache.cached(layer)
            yield LayerView(
                n_heads=len(keys),
                n_rows=keys.shape[1],
                keys=keys,
                norms=output_norms(values, output_maps(self._source, layer))
                if "norms" in self._needs
                else None,
                queries=observer.queries(layer) if observer else None,
                attention=observer.attention(layer) if observer else None,
                probe=self._probe(observer, layer) if observer and "probe" in self._needs else None,
            )

    def _probe(self, observer: Observer, layer: int) -> Probe:
        spec = self._source.spec.layers[layer].attention
        return probe_ahead(*observer.statistics(layer), self.n_past, spec)

    def keep(self, rows: Sequence[Rows]) -> None:
        for layer, kept in enumerate(rows):
            self._cache.keep(layer, kept)

    def cache_nbytes(self) -> int:
        return self._cache.nbytes

    def close(self) -> None:
        """Nothing to do: Python frees the memory."""

    def _hidden(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        hidden = self._model.hidden(tokens, self._cache)
        self.n_past = self._cache.n_past
        return hidden
