"""The NumPy reference behind the Backend protocol: slow, float32, the judge of the others."""

from __future__ import annotations

from collections.abc import Sequence

from edgekv.backends.base import require_room
from edgekv.reference.attention import MLAForm
from edgekv.reference.model import ReferenceModel
from edgekv.source import Array, TensorSource


class ReferenceBackend:
    """edgekv.backends.base.Backend over ReferenceModel; the cache is float32."""

    name = "reference"

    def __init__(self, source: TensorSource, n_ctx: int, form: MLAForm = "absorbed") -> None:
        self._model = ReferenceModel(source, form)
        self._cache = self._model.new_cache(n_ctx)
        self.n_ctx = n_ctx
        self.n_vocab = source.spec.vocab

    @property
    def n_past(self) -> int:
        return self._cache.n_past

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens)[-1])

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        return self._model.logits(self._hidden(tokens))

    def decode(self, token: int) -> Array:
        return self.prefill([token])

    def trim(self, n_past: int) -> None:
        self._cache.trim(n_past)

    def cache_nbytes(self) -> int:
        return self._cache.nbytes

    def close(self) -> None:
        """Nothing to free but memory."""

    def _hidden(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        return self._model.hidden(tokens, self._cache)
