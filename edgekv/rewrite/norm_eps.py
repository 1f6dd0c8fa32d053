"""Epsilon of a model's norms, changed without changing what the model computes.

With a = sqrt(new / old),

    a*x / sqrt(mean((a*x)^2) + new) = x / sqrt(mean(x^2) + old)

so what goes into a norm is scaled by a: the residual stream (the embeddings, and all that is added to them:
attn_output, ffn_down), the latent, and the queries' bottleneck.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from edgekv.source import Array, TensorSource, scaled, with_tensors
from edgekv.spec import MLA

_BEFORE_A_NORM = (
    "attn_q_a.weight",
    "attn_output.weight",
    "ffn_down.weight",
    "attn_q_a.bias",
    "attn_output.bias",
)


def with_norm_eps(source: TensorSource, eps: float) -> TensorSource:
    """A dense MLA model without norms after its attention, all of whose norms have the epsilon `eps`."""
    spec = source.spec
    scale = float(np.sqrt(eps / spec.norm_eps))
    computed = {"token_embd.weight": scaled(source, "token_embd.weight", scale)}
    if spec.tied_embeddings:  # the head reads the scaled embeddings
        computed["output_norm.weight"] = scaled(source, "output_norm.weight", 1 / scale)
    for i, layer in enumerate(spec.layers):
        assert isinstance(layer.attention, MLA)
        for kv_a in (f"blk.{i}.attn_kv_a_mqa.weight", f"blk.{i}.attn_kv_a_mqa.bias"):
            computed[kv_a] = partial(_with_scaled_latent, source, kv_a, layer.attention.kv_lora_rank, scale)
        computed |= {
            name: scaled(source, name, scale) for name in (f"blk.{i}.{tensor}" for tensor in _BEFORE_A_NORM)
        }
    return with_tensors(source, computed, replace(spec, norm_eps=eps))


def _with_scaled_latent(source: TensorSource, name: str, rank: int, scale: float) -> Array:
    rows = source.load(name)  # (R + P, D), or (R + P,)
    return np.concatenate([rows[:rank] * np.float32(scale), rows[rank:]])
