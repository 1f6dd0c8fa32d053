"""The reference forward pass in NumPy: the oracle that proves every faster path right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekv.attention import MLAForm, gqa_attention, mla_attention
from edgekv.cache.store import KVCache
from edgekv.ops import rms_norm, swiglu
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA, ModelSpec

BlockWeights = dict[str, Array]


def load_block(source: TensorSource, layer: int) -> BlockWeights:
    """All tensors of one block in float32, keyed by the name after `blk.<i>.`."""
    prefix = f"blk.{layer}."
    return {
        name.removeprefix(prefix): source.load(name) for name in source.names() if name.startswith(prefix)
    }


def block_forward(
    x: Array, w: BlockWeights, spec: ModelSpec, layer: int, cache: KVCache, form: MLAForm = "absorbed"
) -> Array:
    """One pre-norm transformer block on hidden states x (T, D)."""
    attention = spec.layers[layer].attention
    normed = rms_norm(x, w["attn_norm.weight"], spec.norm_eps)
    if isinstance(attention, MLA):
        x = x + mla_attention(normed, w, attention, spec.norm_eps, cache, layer, form)
    else:
        x = x + gqa_attention(normed, w, attention, cache, layer)
    normed = rms_norm(x, w["ffn_norm.weight"], spec.norm_eps)
    return x + swiglu(normed, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])


class ReferenceModel:
    """A llama or dense deepseek2 model, all weights in float32 memory.

    `form` picks how MLA is computed; see edgekv.attention.mla_attention.
    """

    def __init__(self, source: TensorSource, form: MLAForm = "absorbed") -> None:
        self.spec = source.spec
        self.form: MLAForm = form
        self._embed = source.load("token_embd.weight")  # (vocab, D)
        self._blocks = [load_block(source, i) for i in range(self.spec.n_layers)]
        self._norm = source.load("output_norm.weight")
        self._head = self._embed if self.spec.tied_embeddings else source.load("output.weight")

    def new_cache(self, n_ctx: int) -> KVCache:
        return KVCache(self.spec, n_ctx)

    def hidden(self, tokens: Sequence[int], cache: KVCache) -> Array:
        """Append tokens to the cache; their normed final hidden states, (T, D)."""
        x = self._embed[np.asarray(tokens, dtype=np.int64)]
        for i, weights in enumerate(self._blocks):
            x = block_forward(x, weights, self.spec, i, cache, self.form)
        cache.advance(len(tokens))
        return rms_norm(x, self._norm, self.spec.norm_eps)

    def logits(self, hidden: Array) -> Array:
        """Hidden states (..., D) to logits (..., vocab)."""
        return hidden @ self._head.T
