"""From what attention mixes to what a layer adds: value and output matrices, multiplied."""

from __future__ import annotations

import numpy as np

from edgekv.source import Array, TensorSource
from edgekv.spec import MLA


def output_maps(source: TensorSource, layer: int) -> Array:
    """(H, V, D): from a head's mix of values to the output; of a latent (H, R, D), behind its value matrix."""
    spec = source.spec.layers[layer].attention
    w_o = source.load(f"blk.{layer}.attn_output.weight")  # (D, H * V)
    by_head = w_o.reshape(len(w_o), spec.n_heads, -1).transpose(1, 2, 0)
    if not isinstance(spec, MLA):
        return by_head
    return np.asarray(source.load(f"blk.{layer}.attn_v_b.weight").swapaxes(1, 2) @ by_head)
