"""TransMLA's training-free method (arXiv 2502.07864), with EdgeKV's signature, for comparison.

RoRoPE (section 4.1): a real rotation across KV heads, per frequency, gathers the keys' energy in one head, which
keeps RoPE; the others lose it. FreqFold (4.2): neighbouring frequencies are treated as one for that rotation.
Balanced PCA (4.3): the remaining keys are divided by the ratio of mean channel norms before keys and values share
one PCA of their activations.
"""

from __future__ import annotations

import numpy as np

from edgekv.convert.methods import LayerMaps, LayerStats, split_heads
from edgekv.reference.model import BlockWeights
from edgekv.rewrite.linalg import RANK_STEP, Matrix, kept_by_rank, leading
from edgekv.spec import GQA, MLA

FREQUENCY_FOLD = 4


def transmla(w: BlockWeights, stats: LayerStats, gqa: GQA, mla: MLA) -> LayerMaps:
    """One layer by RoRoPE, FreqFold and balanced PCA."""
    _, w_k, w_v, _ = split_heads(w, gqa)
    group = gqa.n_heads // gqa.n_kv_heads
    all_keys, values = (w.reshape(-1, w.shape[-1]) for w in (w_k, w_v))  # (G * K, D)
    activity = all_keys @ stats.covariance @ all_keys.T
    rotation = _rorope(activity, gqa)  # (G * K, G * K), orthonormal rows; the first K are the rope head
    rope_key, keys = np.split(rotation, [mla.rope.dim])
    rope_key, keys = rope_key @ all_keys, keys @ all_keys  # (P, D), (G * K - P, D)
    balance = _mean_norm(keys, stats.covariance) / _mean_norm(values, stats.covariance)
    stacked = np.concatenate([keys / balance, values])
    energy, vectors = np.linalg.eigh(stacked @ stats.covariance @ stacked.T)
    basis = leading(vectors, mla.kv_lora_rank)
    key_basis, value_basis = basis[: len(keys)] * balance, basis[len(keys) :]
    by_kv_head = rotation.reshape(len(rotation), gqa.n_kv_heads, -1).swapaxes(0, 1)
    heads = np.repeat(
        by_kv_head, group, axis=0
    )  # (H, G * K, K): how each head's query enters the rotated keys
    nope = np.stack([key_basis.T @ head[mla.rope.dim :] for head in heads])
    query_map = np.concatenate([nope, heads[:, : mla.rope.dim]], axis=1) * gqa.head_dim**-0.5
    value = value_basis.reshape(gqa.n_kv_heads, gqa.head_dim, -1)
    return LayerMaps(
        latent=(basis.T @ stacked).astype(np.float32),
        rope_key=rope_key.astype(np.float32),
        query_map=query_map.astype(np.float32),
        value=np.repeat(value, group, axis=0).astype(np.float32),
        rope_kept=float(np.trace(rope_key @ stats.covariance @ rope_key.T) / np.trace(activity)),
        latent_kept=float(energy[::-1][: mla.kv_lora_rank].sum() / energy.sum()),
        latent_kept_at=kept_by_rank(energy, range(RANK_STEP, len(energy) + 1, RANK_STEP)),
    )


def _rorope(activity: Matrix, gqa: GQA) -> Matrix:
    """The rotation of all heads' keys: row 2j + part of the first K rows is what frequency j keeps with RoPE.

    activity (G * K, G * K): the second moment of the keys.
    """
    g, k = gqa.n_kv_heads, gqa.head_dim
    fold = FREQUENCY_FOLD
    rows = np.zeros((g, k, g, k))  # (component, rope dim) <- (head, key dim)
    activity = activity.reshape(g, k // 2, 2, g, k // 2, 2)
    for first in range(0, k // 2, fold):
        pairs = np.arange(first, min(first + fold, k // 2))
        size = g * len(pairs)
        real = activity[:, pairs, 0][:, :, :, pairs, 0].reshape(size, size)
        imaginary = activity[:, pairs, 1][:, :, :, pairs, 1].reshape(size, size)
        _, vectors = np.linalg.eigh(real + imaginary)
        basis = vectors[:, ::-1].T.reshape(g, len(pairs), g, len(pairs))  # strongest first: they fill head 0
        for part in (0, 1):
            at = np.ix_(np.arange(g), 2 * pairs + part, np.arange(g), 2 * pairs + part)
            rows[at] = basis
    return rows.reshape(g * k, g * k)


def _mean_norm(rows: Matrix, covariance: Matrix) -> float:
    """Mean over channels of the root mean square of rows @ x."""
    return float(np.sqrt(np.einsum("nd,nd->n", rows @ covariance, rows)).mean())
