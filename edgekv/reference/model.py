"""Reference forward pass in NumPy: the oracle that proves every faster path right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.store import KVCache
from edgekv.reference.attention import MLAForm, encoded_attention, gqa_attention, mla_attention
from edgekv.reference.experts import expert_feed_forward
from edgekv.reference.ops import geglu, relu_squared, rms_norm, softcap, swiglu
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA, FFNKind, ModelSpec

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
    """One pre-norm transformer block on hidden states x (N, D)."""
    here, eps = spec.layers[layer], spec.norm_eps
    normed = rms_norm(x, w["attn_norm.weight"], eps)
    if isinstance(here.attention, MLA) and here.attention.encoder:
        mixed = encoded_attention(normed, w, here.attention, eps, cache, layer)
    elif isinstance(here.attention, MLA):
        mixed = mla_attention(normed, w, here.attention, eps, cache, layer, form)
    else:
        mixed = gqa_attention(normed, w, here.attention, cache, layer, eps)
    return behind_attention(x, mixed, w, spec, layer)


def behind_attention(x: Array, mixed: Array, w: BlockWeights, spec: ModelSpec, layer: int) -> Array:
    """The rest of a block: hidden states x (N, D) and what the attention makes of them, (N, D)."""
    here, scale, eps = spec.layers[layer], np.float32(spec.residual_scale), spec.norm_eps
    if here.post_norms:
        mixed = rms_norm(mixed, w["post_attention_norm.weight"], eps)
    x = x + scale * mixed
    normed = rms_norm(x, w["ffn_norm.weight"], eps)
    fed = expert_feed_forward(normed, w, here.experts) if here.experts else feed_forward(normed, w, here.ffn)
    if here.post_norms:
        fed = rms_norm(fed, w["post_ffw_norm.weight"], eps)
    return x + scale * fed


def feed_forward(x: Array, w: BlockWeights, kind: FFNKind) -> Array:
    """The block's feed-forward on normed x (T, D)."""
    if kind == "relu_squared":
        return relu_squared(x, w["ffn_up.weight"], w["ffn_down.weight"])
    if kind == "geglu":
        return geglu(x, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])
    return swiglu(x, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])


class ReferenceModel:
    """A decoder (GQA or MLA), all weights in float32 memory.

    `form` picks how MLA is computed; see edgekv.reference.attention.mla_attention.
    """

    def __init__(self, source: TensorSource, form: MLAForm = "absorbed") -> None:
        self.spec = source.spec
        self.form: MLAForm = form
        self._embed = source.load("token_embd.weight")  # (vocab, D)
        self._blocks = [load_block(source, i) for i in range(self.spec.n_layers)]
        self._norm = source.load("output_norm.weight")
        self._head = self._embed if self.spec.tied_embeddings else source.load("output.weight")

    def new_cache(self, n_ctx: int, n_sequences: int | None = None) -> KVCache:
        """A cache of n_ctx tokens, of one sequence or of several that advance together."""
        return KVCache(self.spec, n_ctx, n_sequences)

    def hidden(self, tokens: Sequence[int] | NDArray[np.int64], cache: KVCache) -> Array:
        """Append tokens ([B,] T) to the cache; their normed final hidden states, ([B,] T, D)."""
        ids = np.asarray(tokens, dtype=np.int64)
        x = self._embed[ids.reshape(-1)] * np.float32(self.spec.embedding_scale)
        for i, weights in enumerate(self._blocks):
            x = block_forward(x, weights, self.spec, i, cache, self.form)
        cache.advance(ids.shape[-1])
        return rms_norm(x, self._norm, self.spec.norm_eps).reshape(*ids.shape, -1)

    def logits(self, hidden: Array) -> Array:
        """Hidden states (..., D) to logits (..., vocab)."""
        logits = (hidden * np.float32(self.spec.logit_scale)) @ self._head.T
        return softcap(np.asarray(logits, dtype=np.float32), self.spec.logit_softcap)
