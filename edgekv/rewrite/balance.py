"""Balanced scales between pairs of weights whose product alone counts, so that training treats both alike.

A latent channel times g, and what reads it divided by g, is the same model; so are a head's no-rope query and
its k_b, its value and W_o, and the rope key and the queries that meet it. A conversion leaves such pairs far apart (its
encoder undoes the covariance of the input), while AdamW moves every weight by about the same amount: then one side
hardly changes and the other changes too much. Here both sides get the same RMS; the pairs of the rope key keep their
relative sizes, which the conversion chose for a quantized cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgekv.rewrite.cache_basis import ATTENTION
from edgekv.source import Array
from edgekv.spec import MLA

ROUNDS = 8  # k_b and v_b take part in two balances each; this converges far below what matters
Wide = NDArray[np.float64]


def balanced(tensors: Mapping[str, Array], spec: MLA) -> dict[str, Array]:
    """Stacked student tensors (edgekv.heal.weights.student_tensors) with equal RMS on both sides of each scale."""
    h, n, p, r = spec.n_heads, spec.nope_dim, spec.rope.dim, spec.kv_lora_rank
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    q, kv_a, k_b, v_b, output = (wide[name] for name in ATTENTION)
    layers, _, dim = q.shape
    heads = q.reshape(layers, h, n + p, dim)  # views: changed in place
    columns = output.reshape(layers, dim, h, -1)
    for _ in range(ROUNDS):
        g = _ratio(heads[:, :, :n], k_b, (3,), (2,))  # (L, H, N)
        heads[:, :, :n] *= g[..., None]
        k_b /= g[:, :, None]
        g = _ratio(v_b, columns, (3,), (1,))  # (L, H, V)
        v_b *= g[..., None]
        columns /= g[:, None]
        reading = np.sqrt(
            (_square(k_b, (1, 3)) * n + _square(v_b, (1, 2)) * v_b.shape[2]) / (n + v_b.shape[2])
        )
        g = np.sqrt(_safe(reading) / _safe(np.sqrt(_square(kv_a[:, :r], (2,)))))  # (L, R)
        kv_a[:, :r] *= g[..., None]
        k_b /= g[:, None, :, None]
        v_b /= g[:, None, None, :]
    g = _ratio(kv_a[:, r:], heads[:, :, n:], (1, 2), (1, 2, 3))  # (L,)
    kv_a[:, r:] *= g[:, None, None]
    heads[:, :, n:] /= g[:, None, None, None]
    return {name: np.asarray(array, np.float32) for name, array in wide.items()}


def _square(array: Wide, axes: tuple[int, ...]) -> Wide:
    return np.asarray(np.mean(np.square(array), axis=axes))


def _safe(rms: Wide) -> Wide:
    """Zero stays what it is: a channel that nothing writes or reads keeps scale 1 against another such."""
    return np.where(rms > 0, rms, 1.0)


def _ratio(left: Wide, right: Wide, left_axes: tuple[int, ...], right_axes: tuple[int, ...]) -> Wide:
    """The factor for `left` that gives both sides the same RMS."""
    a, b = np.sqrt(_square(left, left_axes)), np.sqrt(_square(right, right_axes))
    return np.sqrt(_safe(b) / _safe(a))
