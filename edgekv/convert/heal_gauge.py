"""Scales that the student's function does not depend on, chosen so that training treats both sides alike.

A latent channel times g, and what reads it divided by g, is the same model; so are a head's no-rope query and
its k_b, its value and W_o, and the rope key and the queries that meet it. A conversion leaves such pairs far apart (its
encoder undoes the covariance of the input), while AdamW moves every weight by about the same amount: then one side
hardly moves and the other is shaken. Here both sides get the same RMS; the pairs of the rope key keep their sizes
among each other, which the conversion chose for a quantized cache.

Once healed, a student is put into the basis in which a quantized cache loses least (edgekv/convert/cache_basis.py).
Training moves towards it, but slowly, even where it simulates the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.store import KVCache
from edgekv.convert.cache_basis import ATTENTION, in_cache_basis
from edgekv.convert.heal_file import MEAN_SQUARE, healed_source
from edgekv.model import block_forward, load_block
from edgekv.ops import rms_norm
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA

ROUNDS = 8  # k_b and v_b take part in two balances each; this converges far below what matters
Wide = NDArray[np.float64]
BASIS_TOKENS = 4096  # of text are enough to choose a basis by
BASIS_WINDOW = 256  # tokens, where the model writes it: half the steps of a calibration window


def balanced(tensors: Mapping[str, Array], spec: MLA) -> dict[str, Array]:
    """Stacked student tensors (edgekv.convert.heal_file.student_tensors) with equal RMS on both sides of each scale."""
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


def in_best_basis(
    source: TensorSource,
    spec: MLA,
    tensors: Mapping[str, Array],
    windows: NDArray[np.int64],
    progress: Callable[[int, int], None],
) -> dict[str, Array]:
    """Stacked tensors of a student (those of `healed_source`), each layer in its cache basis.

    The student follows token windows (n, T), T > 1, to see what each layer gets; `progress` is told of layers done
    and of all.
    """
    student = healed_source(source, spec, tensors)
    eps = student.spec.norm_eps
    states = source.load("token_embd.weight")[windows]
    caches = [KVCache(student.spec, windows.shape[1]) for _ in windows]
    changed: dict[str, list[Array]] = {name: [] for name in (*ATTENTION, MEAN_SQUARE)}
    for i in range(student.spec.n_layers):
        w = load_block(student, i)
        inputs = rms_norm(states, w["attn_norm.weight"], eps)
        layer = in_cache_basis(
            {name: tensors[name][i] for name in ATTENTION}, inputs[:, 1:].reshape(-1, student.spec.dim), spec
        )
        latents = inputs @ layer["kv_a"][: spec.kv_lora_rank].T
        layer[MEAN_SQUARE] = np.mean(np.square(latents))
        for name, array in layer.items():
            changed[name].append(array)
        for x, cache in zip(states, caches, strict=True):
            x[:] = block_forward(x, w, student.spec, i, cache)
        progress(i + 1, student.spec.n_layers)
    return {**tensors, **{name: np.stack(arrays) for name, arrays in changed.items()}}


def _square(array: Wide, axes: tuple[int, ...]) -> Wide:
    return np.asarray(np.mean(np.square(array), axis=axes))


def _safe(rms: Wide) -> Wide:
    """Zero stays what it is: a channel that nothing writes or reads keeps scale 1 against another such."""
    return np.where(rms > 0, rms, 1.0)


def _ratio(left: Wide, right: Wide, left_axes: tuple[int, ...], right_axes: tuple[int, ...]) -> Wide:
    """The factor for `left` that gives both sides the same RMS."""
    a, b = np.sqrt(_square(left, left_axes)), np.sqrt(_square(right, right_axes))
    return np.sqrt(_safe(b) / _safe(a))
