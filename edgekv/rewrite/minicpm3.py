"""MiniCPM3 as `deepseek2`, which caches its latent where llama.cpp's own `minicpm3` decompresses keys and values.

Possible where all LongRoPE factors are one, a linear scaling; `deepseek2` takes no others. MiniCPM's scales (arXiv
2404.06395, appendix A) go into the weights they multiply, LongRoPE's magnitude into the queries, and rope dims become
neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from edgekv.models.gguf.architectures import linear_score_scale
from edgekv.source import Array, TensorSource, scaled, with_tensors, without
from edgekv.spec import MLA, ModelSpec
from edgekv.tensors import with_neighbouring_pairs


def can_fold(spec: ModelSpec) -> bool:
    """Whether `deepseek2` computes the model once its scales are folded."""
    attention = spec.layers[0].attention
    if spec.arch != "minicpm3" or not isinstance(attention, MLA) or attention.scale:
        return False
    return attention.rope.yarn is None and len(set(attention.rope.factors)) <= 1


def folded(source: TensorSource) -> TensorSource:
    """The same model, its output head untied, without scales: arch `deepseek2`."""
    spec = source.spec
    computed = {"token_embd.weight": scaled(source, "token_embd.weight", spec.embedding_scale)}
    for i in range(spec.n_layers):
        q_b, kv_a = (f"blk.{i}.{tensor}.weight" for tensor in ("attn_q_b", "attn_kv_a_mqa"))
        computed |= {q_b: partial(_queries, source, q_b), kv_a: partial(_neighbouring, source, kv_a)}
        for tensor in ("attn_output", "ffn_down"):
            name = f"blk.{i}.{tensor}.weight"
            computed[name] = scaled(source, name, spec.residual_scale)
    head = "token_embd.weight" if spec.tied_embeddings else "output.weight"
    out = with_tensors(without(source, "output.weight"), computed, _plain_spec(spec))
    out.add("output.weight", source.shape(head), scaled(source, head, spec.logit_scale))
    return out


def _plain_spec(spec: ModelSpec) -> ModelSpec:
    layers = []
    for layer in spec.layers:
        attention = layer.attention
        factors = () if set(attention.rope.factors) <= {1.0} else attention.rope.factors
        rope = replace(attention.rope, layout="interleaved", factors=factors, magnitude=1.0)
        scale = linear_score_scale(factors[0], attention.head_dim) if factors else 0.0
        layers.append(replace(layer, attention=replace(attention, rope=rope, scale=scale)))
    return replace(
        spec,
        arch="deepseek2",
        layers=tuple(layers),
        tied_embeddings=False,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
    )


def _queries(source: TensorSource, name: str) -> Array:
    """attn_q_b whose scores come out as `deepseek2` scales them: rope's magnitude and its linear factor undone."""
    attention = source.spec.layers[0].attention
    assert isinstance(attention, MLA)
    rope, weight = attention.rope, _neighbouring(source, name)
    heads = weight.reshape(attention.n_heads, attention.head_dim, -1)
    heads[:, attention.nope_dim :] *= np.float32(rope.magnitude**2)  # of the queries and of the key
    factor = rope.factors[0] if rope.factors else 1.0
    heads *= np.float32(attention.score_scale / linear_score_scale(factor, attention.head_dim))
    return weight


def _neighbouring(source: TensorSource, name: str) -> Array:
    """The rope rows of the queries, or of the one rope key, in neighbouring pairs."""
    attention = source.spec.layers[0].attention
    n_heads = attention.n_heads if name.endswith("q_b.weight") else 1
    return with_neighbouring_pairs(source.load(name), n_heads, attention.rope.dim)
