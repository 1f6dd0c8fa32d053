"""The KV cache of the reference model: plain float32 arrays, one pair a layer."""

from __future__ import annotations

import numpy as np

from edgekv.source import Array
from edgekv.spec import MLA, ModelSpec


class KVCache:
    """Keys and values of up to n_ctx tokens, preallocated.

    For GQA a layer keeps k and v, each (G, n_ctx, K). For MLA it keeps one array of rows
    (1, n_ctx, R + P), the latent and the rope key, and v is a view of the first R values.
    """

    def __init__(self, spec: ModelSpec, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.n_past = 0
        self._k: list[Array] = []
        self._v: list[Array] = []
        for layer in spec.layers:
            attention = layer.attention
            if isinstance(attention, MLA):
                rows = np.zeros((1, n_ctx, attention.cache_values), np.float32)
                self._k.append(rows)
                self._v.append(rows[..., : attention.kv_lora_rank])
            else:
                shape = (attention.n_kv_heads, n_ctx, attention.head_dim)
                self._k.append(np.zeros(shape, np.float32))
                self._v.append(np.zeros(shape, np.float32))

    def append(self, layer: int, k: Array, v: Array | None) -> tuple[Array, Array]:
        """Store k (T, G, width) and v (T, G, V) behind the n_past tokens; None for MLA, whose v is in k.

        Returns all cached k (G, S, width) and v (G, S, V), the new ones included. The tokens count
        only after `advance`.
        """
        start, stop = self.n_past, self.n_past + k.shape[0]
        assert stop <= self.n_ctx, (stop, self.n_ctx)
        self._k[layer][:, start:stop] = k.swapaxes(0, 1)
        if v is not None:
            self._v[layer][:, start:stop] = v.swapaxes(0, 1)
        return self._k[layer][:, :stop], self._v[layer][:, :stop]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` that every layer has appended."""
        self.n_past += n_tokens

    def trim(self, n_past: int) -> None:
        """Forget every token from position `n_past` on."""
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        self.n_past = n_past

    @property
    def nbytes(self) -> int:
        """Bytes allocated; a v that is a view of k counts once."""
        return sum(
            k.nbytes + (0 if np.shares_memory(k, v) else v.nbytes)
            for k, v in zip(self._k, self._v, strict=True)
        )
