"""Readers of a GGUF's layers: one function per architecture makes a LayerSpec of the keys.

What a key does, and what holds without it: llama.cpp src/models/<architecture>.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import log, sqrt
from types import MappingProxyType

from edgekv.models.gguf.keys import Keys
from edgekv.spec import GQA, MAX_ROPE_DIM, MLA, Experts, LayerSpec, RopeLayout, RopeSpec, Yarn

Shapes = Mapping[str, tuple[int, ...]]
Reader = Callable[[Keys, Shapes, int], LayerSpec]
SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
NOPE_INTERVAL = 4  # smollm3.cpp: n_no_rope_layer_step
# (layers, and then the score scale is of the width a head instead of the head dim): gemma2.cpp, gemma3.cpp
GEMMA_27B = MappingProxyType({"gemma2": 46, "gemma3": 62})
# All but the last of this many layers have a sliding window, unless a key says so.
LOCAL_EVERY = MappingProxyType({"gemma2": 2, "gemma3": 6})


def read_layers(keys: Keys, shapes: Shapes, n_layers: int) -> tuple[LayerSpec, ...]:
    """Every layer of the model.

    Raises:
        ModelFileError: keys are missing, impossible, or contradict each other.
        UnsupportedError: the model is sound, but EdgeKV would not compute it as it is meant.
    """
    return tuple(READERS[keys.arch](keys, shapes, layer) for layer in range(n_layers))


def _llama(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    return _layer(keys, _gqa(keys, shapes, "interleaved"))


def _qwen(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    return _layer(keys, _gqa(keys, shapes, "half"))


def _phi3(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    window = keys.integer("attention.sliding_window", 0, least=0)
    attention = _gqa(keys, shapes, "half")
    rope = replace(attention.rope, magnitude=keys.number("rope.scaling.attn_factor", 1.0))
    return _layer(keys, replace(attention, window=window, rope=rope))


def _smollm3(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    attention = _gqa(keys, shapes, "interleaved")
    if (layer + 1) % NOPE_INTERVAL == 0:
        attention = replace(attention, rope=replace(attention.rope, dim=0))
    return _layer(keys, attention)


def _gemma2(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    attention = _gemma(keys, shapes)
    window = keys.integer("attention.sliding_window", 4096) if _is_local(keys, layer) else 0
    cap = keys.number("attn_logit_softcapping", 50.0)
    return _geglu(keys, replace(attention, window=window, softcap=cap))


def _gemma3(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    attention = _gemma(keys, shapes)
    window = keys.integer("attention.sliding_window", 0, least=0)
    local_theta = keys.number("rope.freq_base_swa", 10000.0)
    if not window or not _is_local(keys, layer):
        return _geglu(keys, attention)
    return _geglu(
        keys, replace(attention, window=window, rope=RopeSpec(local_theta, attention.rope.dim, "half"))
    )


def _gemma(keys: Keys, shapes: Shapes) -> GQA:
    attention = _gqa(keys, shapes, "half")
    n_layers, dim = keys.integer("block_count"), keys.integer("embedding_length")
    return replace(attention, scale=gemma_score_scale(keys.arch, n_layers, dim, attention.n_heads))


def gemma_score_scale(arch: str, n_layers: int, dim: int, n_heads: int) -> float:
    """What llama.cpp multiplies a Gemma's scores by, 0 for 1/sqrt(head_dim)."""
    return 1 / sqrt(dim // n_heads) if n_layers == GEMMA_27B[arch] else 0.0


def _gqa(keys: Keys, shapes: Shapes, layout: RopeLayout) -> GQA:
    n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    n_kv_heads = keys.integer("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        keys.malformed(f"{n_heads} query heads do not divide among {n_kv_heads} KV heads")
    if dim % n_heads and keys.optional("attention.key_length") is None:
        keys.malformed(f"a width of {dim} does not divide among {n_heads} heads")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    value_dim = keys.integer("attention.value_length", dim // n_heads)
    if rope_dim % 2 or not head_dim == rope_dim == value_dim:  # as llama.cpp wants of arch llama
        keys.malformed(
            f"key, value and rope dims of a head are {head_dim}, {value_dim}, {rope_dim}: not one even number",
            "choose a model whose heads are rotated as a whole",
        )
    return GQA(
        n_heads,
        n_kv_heads,
        head_dim,
        _rope(keys, rope_dim, layout),
        bias="blk.0.attn_q.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def _rope(keys: Keys, dim: int, layout: RopeLayout) -> RopeSpec:
    """The plain rotary embedding, or what `rope.scaling` makes of it."""
    if dim > MAX_ROPE_DIM:
        keys.malformed(f"{dim} rotated dims in a head are more than the {MAX_ROPE_DIM} that any model has")
    plain = RopeSpec(keys.number("rope.freq_base", 10000.0), dim, layout)
    kind = keys.optional("rope.scaling.type") or "linear"
    name = "rope.scaling.factor" if keys.optional("rope.scaling.factor") else "rope.scale_linear"
    if kind == "none" or (kind in ("linear", "longrope") and (keys.optional(name) or 1.0) == 1.0):
        return plain
    factor = keys.number(name, 1.0)
    if kind == "linear":
        return replace(plain, factors=(factor,) * (dim // 2))
    if kind != "yarn":
        keys.unsupported(f"RoPE scaling {kind!r}")
    context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    return replace(plain, yarn=Yarn(factor, context), magnitude=yarn_magnitude(keys.arch, factor))


def yarn_magnitude(arch: str, factor: float) -> float:
    """What llama.cpp's YaRN multiplies rotated dims by; in `deepseek2` its two mscales cancel there."""
    return 1.0 if arch == "deepseek2" else 1 + 0.1 * log(factor)


def _mla(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    rope_dim, rank = keys.integer("rope.dimension_count"), keys.integer("attention.kv_lora_rank")
    head_dim = keys.integer("attention.key_length_mla")
    _check_rope_dim(keys, rope_dim, head_dim)
    for key, implied in (("head_count_kv", 1), ("key_length", rank + rope_dim), ("value_length", rank)):
        if (value := keys.integer(f"attention.{key}")) != implied:
            keys.malformed(f"deepseek2.attention.{key} is {value}, the latent cache implies {implied}")
    rope = _rope(keys, rope_dim, "interleaved")
    scale = 0.0
    if rope.factors:
        scale = linear_score_scale(rope.factors[0], head_dim)
    if rope.yarn and keys.optional("rope.scaling.yarn_log_multiplier"):
        mscale = 1 + keys.number("rope.scaling.yarn_log_multiplier") * log(rope.yarn.factor)
        scale = mscale * mscale * head_dim**-0.5
    attention = MLA(
        n_heads=keys.integer("attention.head_count"),
        kv_lora_rank=rank,
        nope_dim=head_dim - rope_dim,
        value_dim=keys.integer("attention.value_length_mla"),
        rope=rope,
        q_lora_rank=keys.integer("attention.q_lora_rank", 0, least=0),
        scale=scale,
    )
    if layer < keys.integer("leading_dense_block_count", 0, least=0):
        return _layer(keys, attention)
    return replace(_layer(keys, attention), experts=_experts(keys, shapes, layer))


def linear_score_scale(factor: float, head_dim: int) -> float:
    """What `deepseek2` multiplies scores by where RoPE is scaled by `factor`, as if that were YaRN's."""
    return float((1 + 0.1 * log(factor)) ** 2 / sqrt(head_dim))


def _experts(keys: Keys, shapes: Shapes, layer: int) -> Experts:
    return Experts(
        count=keys.integer("expert_count"),
        used=keys.integer("expert_used_count"),
        dim=keys.integer("expert_feed_forward_length"),
        shared=keys.integer("expert_shared_count"),
        gating="sigmoid" if keys.optional("expert_gating_func") == SIGMOID else "softmax",
        norm_weights=bool(keys.optional("expert_weights_norm")),
        scale=keys.number("expert_weights_scale", 1.0),
        bias=f"blk.{layer}.exp_probs_b.bias" in shapes,
        groups=max(keys.integer("expert_group_count", 1, least=0), 1),
        used_groups=max(keys.integer("expert_group_used_count", 1, least=0), 1),
    )


def _minicpm3(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    """MiniCPM3 (llama.cpp src/models/minicpm3.cpp): low-rank queries, LongRoPE factors, NEOX pairs."""
    attention = replace(_plain_mla(keys, "half"), q_lora_rank=keys.integer("attention.q_lora_rank"))
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    return _layer(keys, replace(attention, rope=replace(attention.rope, magnitude=magnitude)))


def _plm(keys: Keys, shapes: Shapes, layer: int) -> LayerSpec:
    """PLM (llama.cpp src/models/plm.cpp)."""
    return LayerSpec(_plain_mla(keys, "interleaved"), keys.integer("feed_forward_length"), "relu_squared")


def _plain_mla(keys: Keys, layout: RopeLayout) -> MLA:
    """MLA described by the dims of its decompressed keys and values, as both llama.cpp graphs have it."""
    n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if keys.integer("attention.head_count_kv", n_heads) != n_heads:
        keys.malformed("attention.head_count_kv differs from attention.head_count")
    head_dim, rope_dim = keys.integer("attention.key_length"), keys.integer("rope.dimension_count")
    _check_rope_dim(keys, rope_dim, head_dim)
    return MLA(
        n_heads=n_heads,
        kv_lora_rank=keys.integer("attention.kv_lora_rank"),
        nope_dim=head_dim - rope_dim,
        value_dim=keys.integer("attention.value_length", dim // n_heads),
        rope=RopeSpec(keys.number("rope.freq_base", 10000.0), rope_dim, layout),
    )


def _check_rope_dim(keys: Keys, rope_dim: int, head_dim: int) -> None:
    if rope_dim % 2 or rope_dim >= head_dim:
        keys.malformed(
            f"rope.dimension_count is {rope_dim}, an even number below the head's {head_dim} was expected"
        )


def _layer(keys: Keys, attention: GQA | MLA) -> LayerSpec:
    return LayerSpec(attention, keys.integer("feed_forward_length"))


def _geglu(keys: Keys, attention: GQA) -> LayerSpec:
    return LayerSpec(attention, keys.integer("feed_forward_length"), "geglu", post_norms=True)


def _is_local(keys: Keys, layer: int) -> bool:
    """Whether a layer has a sliding window: as a list says, or all but the last of LOCAL_EVERY."""
    given = keys.optional("attention.sliding_window_pattern")
    if isinstance(given, list):
        if layer >= len(given):
            keys.malformed(f"{keys.arch}.attention.sliding_window_pattern has {len(given)} items, too few")
        return bool(given[layer])
    every = given if isinstance(given, int) and not isinstance(given, bool) else LOCAL_EVERY[keys.arch]
    return is_local(layer, every)


def is_local(layer: int, every: int) -> bool:
    """Whether a layer has a sliding window where all but the last of `every` have."""
    return every == 0 or layer % every < every - 1


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _qwen,
        "qwen3": _qwen,
        "phi3": _phi3,
        "smollm3": _smollm3,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "deepseek2": _mla,
        "minicpm3": _minicpm3,
        "plm": _plm,
    }
)
