"""Biases of queries, keys and values, folded into the weights for a graph that has no place for biases.

Normed inputs have a strong common direction: a vector u with u . x close to 1 for every token. What a bias b adds,
the weight b u^T adds nearly as well. The error of folding is E(1 - u . x)^2. A key's bias on a slow RoPE pair can be
left out: as long as the pair hardly turns, the bias adds the same to all scores of a query, and softmax cancels it.
Qwen2.5's largest biases, tens of times its activations, are of this kind.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.output_fit import Moments, fit_towards
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import inverse_frequencies
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
    """Relative change of each RoPE pair's rotated bias over STEADY tokens, to first order: (K / 2,)."""
    return np.asarray(inverse_frequencies(gqa.rope) * STEADY / np.sqrt(12))
