"""An encoder (edgekv.spec.Encoder) times the projections to keys and values: one from the input to a cached row.

Only where nothing is normed between them (QK-norm).
"""

from __future__ import annotations

import numpy as np

from edgekv.source import Array


def fold_encoder(
    encoder: Array, offset: Array, keys: Array, values: Array, key_bias: Array | None
) -> tuple[Array, Array]:
    """A matrix (W, D) and a bias (W,) from the normed input to a cached row, multiplied in float64.

    Args:
        encoder, offset: from keys and values of all heads to a row: (W, 2 * G * K) and (W,).
        keys, values: the projections, (G * K, D) each. What a value bias adds leaves with the output.
    """
    exact = encoder.astype(np.float64)
    bias = offset.astype(np.float64)
    if key_bias is not None:
        bias = bias + exact[:, : len(key_bias)] @ key_bias
    weight = exact @ np.concatenate([keys, values])
    return weight.astype(np.float32), bias.astype(np.float32)
