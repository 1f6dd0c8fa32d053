"""Encoded latents (edgekv.spec.Encoder) without QK-norm as DeepseekV3 has MLA: exact, biases included.

What encodes keys and values is linear, so that it folds into one projection of the input, whose bias holds that of
the keys. Queries with a bias come through DeepseekV3's bottleneck, the one place that has a bias for them
(attention_bias): q_a are the original's queries of all heads, q_b maps each head's to what reads the rope key and
copies it beside; k_b then reads the latent. Both norms in between are made linear by the norm trick
(edgekv.rewrite.norm_trick), for inputs of a size that the attention's norm bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgekv.rewrite.encoder_fold import fold_encoder
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import MLA, RopeSpec

# s^2 * mean(c^2) / eps with c of inputs that point everywhere alike: a thousandth of the calibrated trick's, for
# those that do not. float32 and bfloat16 have the exponents for it.
SMALLNESS = 1e-7
LADDER_TOLERANCE = 1e-6


def is_encoded(source: TensorSource) -> bool:
    """Whether its latents are encoded from keys and values."""
    attention = source.spec.layers[0].attention
    return isinstance(attention, MLA) and attention.encoder is not None


def folded_attention(mla: MLA) -> MLA:
    """The shape of `mla` without its encoder: each head's original query is its part that reads the latent."""
    return MLA(
        mla.n_heads,
        mla.kv_lora_rank,
        mla.head_dim,
        mla.value_dim,
        plain_ladder(mla.rope),
        q_lora_rank=mla.n_heads * mla.head_dim,
    )


def plain_ladder(rope: RopeSpec) -> RopeSpec:
    """The same frequencies by theta alone, if they are a ladder; else as they are."""
    factors = np.array(rope.factors)
    if rope.theta != 1.0 or len(factors) < 2:
        return rope
    theta = float(f"{factors[1] ** len(factors):.9g}")
    ladder = theta ** (np.arange(len(factors)) / len(factors))
    if not np.allclose(factors, ladder, rtol=LADDER_TOLERANCE):
        return rope
    return RopeSpec(theta, rope.dim, rope.layout)


def folded(source: TensorSource) -> TensorSource:
    """The source with plain MLA tensors and three biases in each layer: attn_q_a, attn_kv_a_mqa, attn_output."""
    spec = source.spec
    layers = []
    for layer in spec.layers:
        assert isinstance(layer.attention, MLA)
        layers.append(replace(layer, attention=folded_attention(layer.attention)))
    out = LazySource(replace(spec, layers=tuple(layers)), source.metadata)
    for name in source.names():
        _, _, tensor = name.rpartition(".attn_")
        if tensor in ("norm.weight", "v_b.weight", "output.weight", "output.bias") or ".attn_" not in name:
            out.borrow(source, name)
    for i, layer in enumerate(spec.layers):
        mla = layer.attention
        assert isinstance(mla, MLA)
        for tensor, (shape, load) in _tensors(source, f"blk.{i}.attn_", mla).items():
            out.add(f"blk.{i}.attn_{tensor}", shape, load)
    return out


def _tensors(
    source: TensorSource, prefix: str, mla: MLA
) -> dict[str, tuple[tuple[int, ...], Callable[[], Array]]]:
    """Shapes of a layer's tensors and what computes them, one at a time."""
    h, k, r, rows = mla.n_heads, mla.head_dim, mla.kv_lora_rank, mla.cache_values
    dim = source.spec.dim
    return {
        "q_a.weight": ((h * k, dim), lambda: _shrunk_queries(source, prefix)[0]),
        "q_a.bias": ((h * k,), lambda: _shrunk_queries(source, prefix)[1]),
        "q_a_norm.weight": ((h * k,), lambda: _trick_norm(source, prefix, *_queries(source, prefix))),
        "q_b.weight": ((h * (k + mla.rope.dim), h * k), lambda: _readers(source, prefix, mla)),
        "kv_a_mqa.weight": ((rows, dim), lambda: _shrunk_latent(source, prefix, r)[0]),
        "kv_a_mqa.bias": ((rows,), lambda: _shrunk_latent(source, prefix, r)[1]),
        "kv_a_norm.weight": ((r,), lambda: _trick_norm(source, prefix, *_latent(source, prefix, r))),
        "k_b.weight": ((h, r, k), lambda: source.load(f"{prefix}q_map.weight")[:, :r]),
    }


def _queries(source: TensorSource, prefix: str) -> tuple[Array, Array]:
    """The original's queries of all heads: a matrix (H * K, D) and a bias (H * K,)."""
    weight = source.load(f"{prefix}q.weight")
    biased = f"{prefix}q.bias" in frozenset(source.names())
    return weight, source.load(f"{prefix}q.bias") if biased else np.zeros(len(weight), np.float32)


def _rows(source: TensorSource, prefix: str) -> tuple[Array, Array]:
    """What a cached row is of the normed input: a matrix (R + P, D) and a bias (R + P,)."""
    biased = f"{prefix}k.bias" in frozenset(source.names())
    return fold_encoder(
        source.load(f"{prefix}kv_enc.weight"),
        source.load(f"{prefix}kv_enc.bias"),
        source.load(f"{prefix}k.weight"),
        source.load(f"{prefix}v.weight"),
        source.load(f"{prefix}k.bias") if biased else None,
    )


def _latent(source: TensorSource, prefix: str, rank: int) -> tuple[Array, Array]:
    weight, bias = _rows(source, prefix)
    return weight[:rank], bias[:rank]


def _shrink(source: TensorSource, prefix: str, weight: Array, bias: Array) -> np.float32:
    """The norm trick's scale for what a matrix and a bias make of the normed input."""
    gain = source.load(f"{prefix}norm.weight")
    mean_square = float(np.mean(np.square(weight * gain).sum(axis=1) + np.square(bias)))
    return np.float32(np.sqrt(SMALLNESS * source.spec.norm_eps / max(mean_square, 1e-30)))


def _trick_norm(source: TensorSource, prefix: str, weight: Array, bias: Array) -> Array:
    """The norm's weight that undoes `_shrink`."""
    undone = np.sqrt(source.spec.norm_eps) / _shrink(source, prefix, weight, bias)
    return np.full(len(bias), undone, np.float32)


def _shrunk_queries(source: TensorSource, prefix: str) -> tuple[Array, Array]:
    weight, bias = _queries(source, prefix)
    scale = _shrink(source, prefix, weight, bias)
    return weight * scale, bias * scale


def _shrunk_latent(source: TensorSource, prefix: str, rank: int) -> tuple[Array, Array]:
    """The projection to a cached row, its latent shrunk for the norm behind it."""
    weight, bias = _rows(source, prefix)
    scale = np.ones(len(bias), np.float32)
    scale[:rank] = _shrink(source, prefix, weight[:rank], bias[:rank])
    return weight * scale[:, None], bias * scale


def _readers(source: TensorSource, prefix: str, mla: MLA) -> Array:
    """q_b (H * (K + P), H * K): of each head's query the query itself and what reads the rope key.

    DeepseekV3 divides scores by sqrt(K + P), whatever the original did.
    """
    h, k, r, p = mla.n_heads, mla.head_dim, mla.kv_lora_rank, mla.rope.dim
    maps = source.load(f"{prefix}q_map.weight")[:, r:]
    out = np.zeros((h, k + p, h, k), np.float32)
    for head in range(h):
        out[head, :k, head] = np.eye(k)
        out[head, k:, head] = maps[head]
    return (out * np.float32(mla.score_scale * np.sqrt(k + p))).reshape(h * (k + p), h * k)
