"""The NumPy reference as a Backend: slow, in float32, the standard that other engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from edgekv.backends.base import Backend, require_loadable, require_room
from edgekv.cache.rows import CacheRows, Layout
from edgekv.reference.attention import MLAForm
from edgekv.reference.model import ReferenceModel
from edgekv.source import Array, TensorSource


class ReferenceBackend(Backend):
    """edgekv.reference.model.ReferenceModel as a Backend; the cache is float32."""

    name = "reference"

    def __init__(self, source: TensorSource, n_ctx: int, form: MLAForm = "absorbed") -> None:
        self._model = ReferenceModel(source, form)
        self._cache = self._model.new_cache(n_ctx)
        self.n_ctx, self.n_past = n_ctx, 0
        self.n_ctx_train = source.spec.context_length
        self.n_vocab = source.spec.vocab

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens)[-1])

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens))

    def trim(self, n_past: int) -> None:
        self._cache.trim(n_past)
        self.n_past = n_past

    def layout(self) -> Layout:
        return self._cache.layout

    def save(self, start: int = 0) -> CacheRows:
        return self._cache.save(start)

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        self._cache.load(rows)
        self.n_past = rows.n_tokens

    def cache_nbytes(self) -> int:
        return self._cache.nbytes

    def close(self) -> None:
        """Nothing to do: Python frees the memory."""

    def _hidden(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        hidden = self._model.hidden(tokens, self._cache)
        self.n_past = self._cache.n_past
        return hidden
