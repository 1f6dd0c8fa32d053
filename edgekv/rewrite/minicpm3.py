"""MiniCPM3 as `deepseek2`, which caches its latent where llama.cpp's own `minicpm3` decompresses keys and values.

Possible where all LongRoPE factors are one, a linear scaling; `deepseek2` takes no others. MiniCPM's scales (arXiv
2404.06395, appendix A) go into the weights they multiply, LongRoPE's magnitude into the queries, and rope dims become
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from edgekv.models.gguf.architectures import linear_score_scale
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import MLA, ModelSpec


def can_fold(spec: ModelSpec) -> bool:
    """Whether `deepseek2` computes the model once its scales are folded."""
    attention = spec.layers[0].attention
    if spec.arch != "minicpm3" or not isinstance(attention, MLA) or attention.scale:
        return False
    return attention.rope.yarn is None and len(set(attention.rope.factors)) <= 1


def folded(source: TensorSource) -> TensorSource:
    """The same model, its output head untied, without scales: arch `deepseek2`."""
    spec = source.spec
    out = LazySource(_plain_spec(spec), source.metadata)
    scales = {"attn_output.weight": spec.residual_scale, "ffn_down.weight": spec.residual_scale}
    for name in source.names():
        tensor = name.split(".", 2)[-1]
        if name == "token_embd.weight":
            out.add(name, source.shape(name), _scaled(source, name, spec.embedding_scale))
        elif tensor in scales:
            out.add(name, source.shape(name), _scaled(source, name, scales[tensor]))
        elif tensor == "attn_q_b.weight":
            out.add(name, source.shape(name), partial(_queries, source, name))
        elif tensor == "attn_kv_a_mqa.weight":
            out.add(name, source.shape(name), partial(_neighbours, source, name))
        elif name != "output.weight":
            out.borrow(source, name)
    head = "token_embd.weight" if spec.tied_embeddings else "output.weight"
    out.add("output.weight", source.shape(head), _scaled(source, head, spec.logit_scale))
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


def _scaled(source: TensorSource, name: str, scale: float) -> Callable[[], Array]:
    return lambda: source.load(name) * np.float32(scale)


def _queries(source: TensorSource, name: str) -> Array:
    """attn_q_b whose scores come out as `deepseek2` scales them: rope's magnitude and its linear factor undone."""
    attention = source.spec.layers[0].attention
    assert isinstance(attention, MLA)
    rope, weight = attention.rope, _neighbours(source, name)
    heads = weight.reshape(attention.n_heads, attention.head_dim, -1)
    heads[:, attention.nope_dim :] *= np.float32(rope.magnitude**2)  # of the queries and of the key
    factor = rope.factors[0] if rope.factors else 1.0
    heads *= np.float32(attention.score_scale / linear_score_scale(factor, attention.head_dim))
    return weight


def _neighbours(source: TensorSource, name: str) -> Array:
    """Rope rows (j, j + P/2) side by side: the last P of each query head, or of the one rope key."""
    attention = source.spec.layers[0].attention
    assert isinstance(attention, MLA)
    p, weight = attention.rope.dim, source.load(name)
    heads = weight.reshape(attention.n_heads if name.endswith("q_b.weight") else 1, -1, weight.shape[-1])
    halves = heads[:, -p:].reshape(len(heads), 2, p // 2, -1)
    rope = halves.swapaxes(1, 2).reshape(len(heads), p, -1)
    return np.concatenate([heads[:, :-p], rope], axis=1).reshape(weight.shape)
