"""Queries, keys and values without their biases, for a graph that has no place for them.

Normed inputs have a strong common direction: a vector u with u . x close to 1 for every token. What a bias b adds,
b u^T adds nearly as well, and it is a weight. How nearly is E(1 - u . x)^2, which is what folding costs. A key's bias
on a slow RoPE pair needs no stand-in: as long as the pair hardly turns, it adds the same to all scores of a query,
and softmax does not see that. Qwen2.5's largest biases, tens of times its activations, are of this kind.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.output_fit import Moments, fit_towards
from edgekv.model import BlockWeights
from edgekv.ops import inverse_frequencies
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import GQA

STEADY = 256  # tokens over which a pair has to stay still for its bias to be left out


def fold_biases(w: BlockWeights, gqa: GQA, seen: Moments, held_out: Moments) -> tuple[BlockWeights, float]:
    """One layer with its biases folded into its weights, and the relative error of that, sqrt(E(1 - u . x)^2).

    The moments are of the normed inputs (D) with a target of 1. RoPE pairs are interleaved.
    """
    one = fit_towards(np.zeros((1, len(seen.gram))), seen, held_out)
    both = seen + held_out
    error = float(np.sqrt(both.error(one.T, both.n_tokens) / both.n_tokens))
    kept = np.repeat(_turns(gqa) > error, 2)
    folded = {name: array for name, array in w.items() if not name.endswith(".bias")}
    for kind in ("q", "k", "v"):
        bias = w[f"attn_{kind}.bias"]
        if kind == "k":
            bias = (bias.reshape(gqa.n_kv_heads, -1) * kept).reshape(-1)
        folded[f"attn_{kind}.weight"] = w[f"attn_{kind}.weight"] + np.outer(bias, one[0]).astype(np.float32)
    return folded, error


def _turns(gqa: GQA) -> NDArray[np.float64]:
    """By how much of itself each pair's bias varies over STEADY tokens, to first order: (K / 2,)."""
    return np.asarray(inverse_frequencies(gqa.rope) * STEADY / np.sqrt(12))


def with_interleaved_pairs(source: TensorSource) -> TensorSource:
    """A GQA model whose RoPE pairs are dims (2j, 2j + 1): rows of queries and keys reordered, scores unchanged."""
    layers = source.spec.layers
    if not any(isinstance(a := layer.attention, GQA) and a.rope.layout == "half" for layer in layers):
        return source
    reordered = []
    for layer in layers:
        assert isinstance(layer.attention, GQA)
        rope = replace(layer.attention.rope, layout="interleaved")
        reordered.append(replace(layer, attention=replace(layer.attention, rope=rope)))
    out = LazySource(replace(source.spec, layers=tuple(reordered)), source.metadata)
    head_dims = [layer.attention.head_dim for layer in reordered]
    for name in source.names():
        block, _, tensor = name.partition(".attn_")
        if tensor.partition(".")[0] in ("q", "k"):
            head_dim = head_dims[int(block.removeprefix("blk."))]
            out.add(name, source.shape(name), partial(_interleaved, source, name, head_dim))
        else:
            out.borrow(source, name)
    return out


def _interleaved(source: TensorSource, name: str, head_dim: int) -> Array:
    """Rows j and j + K/2 of each head side by side, of a weight (H * K, D) or a bias (H * K,)."""
    rows = source.load(name)
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
