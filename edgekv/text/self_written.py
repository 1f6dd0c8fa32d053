"""Calibration text that the model writes itself, for users without a corpus.

The first token of each sequence is drawn from the vocabulary and the rest from the model (LLM-QAT,
arXiv 2305.17888, section 2.1). Batched decode in NumPy: the weights are read once a step for all sequences.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.progress import Progress
from edgekv.reference.model import BlockWeights, load_block
from edgekv.reference.ops import apply_rope, rms_norm, swiglu
from edgekv.source import Array, TensorSource
from edgekv.spec import GQA, ModelSpec
from edgekv.tokenizer.vocab import text_tokens


def sample_windows(
    source: TensorSource, n_windows: int, length: int, seed: int, progress: Progress
) -> NDArray[np.int64]:
    """Token windows (n_windows, length) sampled at temperature 1 from a GQA model."""
    spec = source.spec
    rng = np.random.default_rng(seed)
    embed = source.load("token_embd.weight")
    norm = source.load("output_norm.weight")
    head = embed if spec.tied_embeddings else source.load("output.weight")
    blocks = [load_block(source, i) for i in range(spec.n_layers)]
    caches = [_LayerCache(layer.attention, n_windows, length) for layer in spec.layers]
    tokens = np.empty((n_windows, length), np.int64)
    tokens[:, 0] = rng.choice(text_tokens(source.metadata, spec.vocab), n_windows)
    for position in range(length - 1):
        x = embed[tokens[:, position]]
        for weights, cache in zip(blocks, caches, strict=True):
            x = _step(x, weights, spec, cache, position)
        logits = rms_norm(x, norm, spec.norm_eps) @ head.T
        # Gumbel-max: argmax of logits plus Gumbel noise is a draw from the softmax
        tokens[:, position + 1] = (logits - np.log(rng.exponential(size=logits.shape))).argmax(axis=-1)
        progress(position + 1, length - 1)
    return tokens


class _LayerCache:
    """Keys and values of B sequences that advance together: (B, G, T, K)."""

    def __init__(self, attention: object, n_sequences: int, length: int) -> None:
        assert isinstance(attention, GQA), attention
        self.attention = attention
        shape = (n_sequences, attention.n_kv_heads, length, attention.head_dim)
        self.k, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)


def _step(x: Array, w: BlockWeights, spec: ModelSpec, cache: _LayerCache, position: int) -> Array:
    """One block on one new token of each sequence, x (B, D)."""
    a, n = cache.attention, x.shape[0]
    at = np.full(n, position)
    normed = rms_norm(x, w["attn_norm.weight"], spec.norm_eps)

    def heads(kind: str) -> Array:
        flat = normed @ w[f"attn_{kind}.weight"].T
        return (flat + w[f"attn_{kind}.bias"] if a.bias else flat).reshape(n, -1, a.head_dim)

    q, k = apply_rope(heads("q"), at, a.rope), apply_rope(heads("k"), at, a.rope)
    cache.k[:, :, position] = k
    cache.v[:, :, position] = heads("v")
    keys, values = cache.k[:, :, : position + 1], cache.v[:, :, : position + 1]
    grouped = q.reshape(n, a.n_kv_heads, -1, a.head_dim) * np.float32(a.head_dim**-0.5)
    scores = grouped @ keys.swapaxes(2, 3)  # (B, G, H/G, T)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    x = x + mixed.reshape(n, -1) @ w["attn_output.weight"].T
    normed = rms_norm(x, w["ffn_norm.weight"], spec.norm_eps)
    return x + swiglu(normed, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])
