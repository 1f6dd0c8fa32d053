"""Method of converting one layer, before anything is refitted: its signature, and EdgeKV's own method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgekv.convert.latent import joint_latent, shrink_by_frequency, weighted_keys, weighted_values
from edgekv.convert.rope_key import shared_rope_key
from edgekv.reference.model import BlockWeights
from edgekv.rewrite.linalg import Matrix
from edgekv.source import Array
from edgekv.spec import GQA, MLA


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw at the input of one attention layer.

    covariance (D, D): E[x x^T] of the normed inputs. mixed_covariance (D, D): the same of sum_s p_hs x_s, the inputs
    mixed by a head's attention, averaged over heads. output_scale: root mean square norm of one head's
    share of the attention output.
    """

    covariance: Matrix
    mixed_covariance: Matrix
    output_scale: float


@dataclass(frozen=True)
class LayerMaps:
    """An MLA layer in float32, its latent linear and its scores not yet scaled by 1/sqrt(N + P).

    latent (R, D) and rope_key (P, D) encode; query_map (H, R + P, K) maps a head's original query to the vector that
    multiplies cached rows; value (H, K, R) decodes a head's value. rope_kept and latent_kept are shares of energy,
    latent_kept_at the latter for other ranks.
    """

    latent: Array
    rope_key: Array
    query_map: Array
    value: Array
    rope_kept: float
    latent_kept: float
    latent_kept_at: dict[int, float]


Method = Callable[[BlockWeights, LayerStats, GQA, MLA], LayerMaps]


def split_heads(w: BlockWeights, gqa: GQA) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """w_q (H, K, D), w_k (G, K, D), w_v (G, K, D) and w_o (H, D, K) in float64."""
    h, g, k = gqa.n_heads, gqa.n_kv_heads, gqa.head_dim
    d = w["attn_output.weight"].shape[0]
    return (
        w["attn_q.weight"].reshape(h, k, d).astype(np.float64),
        w["attn_k.weight"].reshape(g, k, d).astype(np.float64),
        w["attn_v.weight"].reshape(g, k, d).astype(np.float64),
        w["attn_output.weight"].reshape(d, h, k).swapaxes(0, 1).astype(np.float64),
    )


def complex_joint(w: BlockWeights, stats: LayerStats, gqa: GQA, mla: MLA) -> LayerMaps:
    """EdgeKV's method: complex principal rope key, the slow leftovers and W_o-weighted values in one latent."""
    w_q, w_k, w_v, w_o = split_heads(w, gqa)
    rope_key = shared_rope_key(w_q, w_k, stats.covariance, gqa, mla.rope)
    keys = shrink_by_frequency(rope_key.leftover, gqa)
    share = np.trace(stats.covariance) / np.trace(stats.mixed_covariance)
    inputs = 0.5 * (stats.covariance + share * stats.mixed_covariance)
    latent = joint_latent(
        weighted_values(w_v, w_o),
        stats.output_scale * weighted_keys(keys, w_q, stats.covariance),
        inputs,
        mla.kv_lora_rank,
        keys,
    )
    group = gqa.n_heads // gqa.n_kv_heads
    nope = np.repeat((latent.keys @ latent.decoder).swapaxes(1, 2), group, axis=0)  # (H, R, K)
    query_map = np.concatenate([nope, rope_key.query], axis=1) * gqa.head_dim**-0.5
    return LayerMaps(
        latent=latent.encoder.astype(np.float32),
        rope_key=rope_key.encoder.astype(np.float32),
        query_map=query_map.astype(np.float32),
        value=np.repeat(w_v @ latent.decoder, group, axis=0).astype(np.float32),
        rope_kept=rope_key.kept,
        latent_kept=latent.kept,
        latent_kept_at=latent.kept_at,
    )
