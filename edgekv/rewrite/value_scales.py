"""Scales of a head's values that the model does not depend on, chosen so that few bits hold its weights.

A value times g and its column of attn_output divided by g is the same model. Fitted outputs leave the columns of a
head sorted by strength, the last up to 10,000 times weaker than the first, and the weakest values in the ten
thousands: block formats have one scale for 32 columns, so all but the strongest round to zero, and float16
overflows at 65504.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from edgekv.source import Array, TensorSource, with_tensors


def value_gains(v_b: Array, output: Array) -> Array:
    """Powers of two (H, V), exact in float32, that make each value as large as what reads it.

    v_b (H, V, R) writes the values, output (D, H * V) reads them; a value that nothing writes or reads keeps 1.
    """
    readers = np.linalg.norm(output, axis=0).reshape(v_b.shape[:2])
    values = np.linalg.norm(v_b, axis=-1)
    known = (values > 0) & (readers > 0)
    ratio = np.where(known, readers, 1) / np.where(known, values, 1)
    return np.asarray(np.exp2(np.round(np.log2(ratio) / 2)), np.float32)


def with_balanced_values(source: TensorSource) -> TensorSource:
    """An MLA model with its values scaled by `value_gains`, layer by layer as it is read."""
    return with_tensors(
        source,
        {
            f"blk.{i}.attn_{tensor}.weight": partial(_scaled, source, i, tensor)
            for i in range(source.spec.n_layers)
            for tensor in ("v_b", "output")
        },
    )


def _scaled(source: TensorSource, layer: int, tensor: str) -> Array:
    v_b, output = (source.load(f"blk.{layer}.attn_{name}.weight") for name in ("v_b", "output"))
    gains = value_gains(v_b, output)
    return v_b * gains[:, :, None] if tensor == "v_b" else output / gains.reshape(-1)
