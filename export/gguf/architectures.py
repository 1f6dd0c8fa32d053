"""Keys of a model's GGUF, by llama.cpp's architectures, and refusal of models that their graphs compute otherwise.

What each graph computes: llama.cpp src/models/<architecture>.cpp of the release that llama-cpp-python 0.3.36
carries. The other direction is edgekv.models.gguf.architectures.
"""

from __future__ import annotations

from math import isclose, log, sqrt
from typing import NoReturn

from edgekv.errors import UnsupportedError
from edgekv.models.gguf.architectures import (
    LOCAL_EVERY,
    NOPE_INTERVAL,
    SIGMOID,
    gemma_score_scale,
    is_local,
    linear_score_scale,
    yarn_magnitude,
)
from edgekv.models.gguf.own import OWN_ARCH, own_keys
from edgekv.models.gguf.spec import JOINT_KV_B, minicpm3_scales
from edgekv.spec import ENCODED, GQA, MLA, MetaValue, ModelSpec, RopeSpec

LITE_LAYERS = (26, 27)  # deepseek2.cpp reads no q_lora_rank with this many, nor with 48 with 128256 tokens


def gguf_arch(spec: ModelSpec) -> str:
    """The llama.cpp architecture that runs a spec, or EdgeKV's own where there is none."""
    if ENCODED in spec.peculiarities:
        return OWN_ARCH
    if isinstance(spec.layers[0].attention, MLA) and spec.arch not in JOINT_KV_B:
        return "deepseek2"
    return spec.arch


def architecture_keys(spec: ModelSpec) -> dict[str, MetaValue]:
    """GGUF keys of a spec, without the architecture that comes first in each.

    Raises:
        UnsupportedError: the architecture's graph would compute something else.
    """
    if gguf_arch(spec) == OWN_ARCH:
        return own_keys(spec)
    layer = spec.layers[0]
    attention = layer.attention
    keys: dict[str, MetaValue] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.dim,
        "feed_forward_length": layer.ffn_dim,
        "vocab_size": spec.vocab,
        "attention.head_count": attention.n_heads,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": attention.rope.theta,
        "rope.dimension_count": attention.rope.dim,
    }
    if isinstance(attention, GQA):
        return keys | _gqa_keys(spec, attention)
    return keys | (_joint_keys(spec, attention) if spec.arch in JOINT_KV_B else _latent_keys(spec, attention))


def is_linear(rope: RopeSpec) -> bool:
    """Whether all frequencies are divided by one number."""
    return len(set(rope.factors)) == 1 and rope.magnitude == 1.0


def _refuse(
    spec: ModelSpec, why: str, remedy: str = "run it in the reference, or choose another model"
) -> NoReturn:
    raise UnsupportedError(f"{spec.name} cannot be written as GGUF {gguf_arch(spec)!r}: {why}; {remedy}")


def _gqa_keys(spec: ModelSpec, attention: GQA) -> dict[str, MetaValue]:
    keys: dict[str, MetaValue] = {
        "attention.head_count_kv": attention.n_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }
    attentions = [layer.attention for layer in spec.layers if isinstance(layer.attention, GQA)]
    _check_gqa(spec, attentions)
    if spec.arch in LOCAL_EVERY:
        return keys | _gemma_keys(spec, attentions)
    if shortest := min((a.window for a in attentions if a.window), default=0):
        # llama.cpp attends to all tokens here: the same thing as long as none lies outside the window.
        keys["context_length"] = min(spec.context_length, shortest)
    return keys | _rope_keys(spec, attention.rope)


def _check_gqa(spec: ModelSpec, attentions: list[GQA]) -> None:
    if spec.arch == "smollm3":
        for i, attention in enumerate(attentions):
            if bool(attention.rope.dim) != bool((i + 1) % NOPE_INTERVAL):
                _refuse(
                    spec, f"llama.cpp leaves RoPE out of every {NOPE_INTERVAL}th layer and the model does not"
                )
    width = attentions[0].n_heads * attentions[0].head_dim
    if spec.arch in ("qwen2", "phi3") and width != spec.dim:
        _refuse(
            spec, f"llama.cpp wants heads that are together as wide as the model, {spec.dim}, not {width}"
        )
    if spec.arch not in LOCAL_EVERY and any(a.scale for a in attentions):
        _refuse(spec, "its scores have a scale of their own")


def _gemma_keys(spec: ModelSpec, attentions: list[GQA]) -> dict[str, MetaValue]:
    """Gemma 2 and 3: local layers with a window, and in Gemma 3 with a RoPE of their own."""
    attention = attentions[0]
    local = [bool(a.window) for a in attentions]
    shared = [a.rope for a in attentions if not a.window] or [attention.rope]
    implied = (
        gemma_score_scale(spec.arch, spec.n_layers, spec.dim, attention.n_heads) or attention.head_dim**-0.5
    )
    if not isclose(attention.score_scale, implied, rel_tol=1e-6):
        _refuse(spec, f"llama.cpp scales its scores by {implied:g}, the model by {attention.score_scale:g}")
    keys: dict[str, MetaValue] = {"rope.freq_base": shared[0].theta} | _rope_keys(spec, shared[0])
    if any(local):
        keys["attention.sliding_window"] = max(a.window for a in attentions)
    if local != [is_local(i, LOCAL_EVERY[spec.arch]) for i in range(spec.n_layers)]:
        keys["attention.sliding_window_pattern"] = local
    if spec.logit_softcap:
        keys["final_logit_softcapping"] = spec.logit_softcap
    if spec.arch == "gemma2":
        if not spec.tied_embeddings:
            _refuse(spec, "llama.cpp has the embedding for its head, the model another matrix")
        if not attention.softcap or not spec.logit_softcap:
            _refuse(spec, "llama.cpp always caps its scores and logits")
        keys["attn_logit_softcapping"] = attention.softcap
    elif any(local):
        keys["rope.freq_base_swa"] = next(a.rope.theta for a in attentions if a.window)
    return keys


def _rope_keys(spec: ModelSpec, rope: RopeSpec) -> dict[str, MetaValue]:
    """Keys of a scaled rotary embedding; factors that differ are a tensor."""
    if rope.is_plain:
        return {}
    if rope.yarn:
        return _yarn_keys(spec, rope)
    if is_linear(rope):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factors[0]}
    if spec.arch == "llama" and rope.magnitude == 1.0:
        return {}
    if spec.arch not in ("phi3", "minicpm3"):
        _refuse(spec, "its graph takes no rope factors")
    return {
        "rope.scaling.original_context_length": spec.context_length,
        "rope.scaling.attn_factor": rope.magnitude,
    }


def _yarn_keys(spec: ModelSpec, rope: RopeSpec) -> dict[str, MetaValue]:
    assert rope.yarn is not None
    yarn = rope.yarn
    if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0):
        _refuse(
            spec,
            f"llama.cpp's YaRN has its ramp between 32 turns and 1, the model {yarn.beta_fast:g} and "
            f"{yarn.beta_slow:g}",
            "with beta_fast 32 and beta_slow 1 in config.json it is written as llama.cpp's own converter does, "
            "another model than was trained",
        )
    wanted = yarn_magnitude(gguf_arch(spec), yarn.factor)
    if not isclose(rope.magnitude, wanted, rel_tol=1e-6):
        _refuse(spec, f"llama.cpp's YaRN has an attention factor of {wanted:g}, the model {rope.magnitude:g}")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_context,
    }


def _latent_keys(spec: ModelSpec, attention: MLA) -> dict[str, MetaValue]:
    """What llama.cpp's loader reads for a model with a latent cache (src/models/deepseek2.cpp)."""
    lite = spec.n_layers in LITE_LAYERS or (spec.n_layers == 48 and spec.vocab == 128256)
    if attention.q_lora_rank and lite:
        _refuse(spec, f"llama.cpp reads no low-rank queries in a model of {spec.n_layers} layers")
    if attention.rope.dim and attention.rope.layout != "interleaved":
        _refuse(spec, "its rope pairs are not neighbours")
    factors = attention.rope.factors
    if factors and not is_linear(attention.rope):
        _refuse(spec, "its graph takes no rope factors")
    wanted = linear_score_scale(factors[0], attention.head_dim) if factors else attention.head_dim**-0.5
    if not attention.rope.yarn and not isclose(attention.score_scale, wanted, rel_tol=1e-6):
        _refuse(spec, f"its scores are scaled by {attention.score_scale:g}, llama.cpp's by {wanted:g}")
    keys: dict[str, MetaValue] = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.q_lora_rank,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.cache_values,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.head_dim,
        "attention.value_length_mla": attention.value_dim,
        "expert_feed_forward_length": 0,
        "expert_shared_count": 0,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    if yarn := attention.rope.yarn:
        if not attention.scale:
            _refuse(spec, "llama.cpp's YaRN also scales the scores (mscale_all_dim), the model does not")
        mscale = sqrt(attention.scale * sqrt(attention.head_dim))
        keys["rope.scaling.yarn_log_multiplier"] = (mscale - 1) / log(yarn.factor)
    return keys | _rope_keys(spec, attention.rope) | _expert_keys(spec)


def _expert_keys(spec: ModelSpec) -> dict[str, MetaValue]:
    dense = [layer.experts is None for layer in spec.layers]
    n_dense = dense.index(False) if False in dense else spec.n_layers
    if any(dense[n_dense:]):
        _refuse(spec, "dense layers follow on layers with experts")
    keys: dict[str, MetaValue] = {"leading_dense_block_count": n_dense}
    experts = spec.layers[-1].experts
    if experts is None:
        return keys
    if not experts.shared:
        _refuse(spec, "its graph wants shared experts")
    if experts.groups > 1 and experts.group_score_of != 2:
        _refuse(spec, "llama.cpp scores a group by its two best experts, DeepSeek-V2 by its best")
    keys |= {
        "expert_count": experts.count,
        "expert_used_count": experts.used,
        "expert_feed_forward_length": experts.dim,
        "expert_shared_count": experts.shared,
        "expert_weights_scale": experts.scale,
        "expert_weights_norm": experts.norm_weights,
        "expert_gating_func": SIGMOID if experts.gating == "sigmoid" else 1,
    }
    if experts.groups > 1:
        keys |= {"expert_group_count": experts.groups, "expert_group_used_count": experts.used_groups}
    return keys


def _joint_keys(spec: ModelSpec, attention: MLA) -> dict[str, MetaValue]:
    """MiniCPM3 and PLM, which llama.cpp runs with decompressed keys and values."""
    keys: dict[str, MetaValue] = {
        "attention.head_count_kv": attention.n_heads,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.value_dim,
    }
    if attention.q_lora_rank:
        keys["attention.q_lora_rank"] = attention.q_lora_rank
    scales = (spec.embedding_scale, spec.residual_scale, spec.logit_scale)
    known: tuple[float, ...] = (1.0, 1.0, 1.0)
    if spec.arch == "minicpm3":
        known = tuple(minicpm3_scales(spec.dim, spec.n_layers).values())
    if not all(isclose(a, b, rel_tol=1e-6) for a, b in zip(scales, known, strict=True)):
        _refuse(spec, f"llama.cpp scales embeddings, residuals and logits by {known}, the model by {scales}")
    return keys | _rope_keys(spec, attention.rope)
