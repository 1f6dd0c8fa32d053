"""Readers of config.json: one function per architecture family gives a layer's spec.

Field names and defaults: transformers src/transformers/models/*/configuration_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from types import MappingProxyType

from edgekv.models.gguf.architectures import LOCAL_EVERY, is_local
from edgekv.models.gguf.spec import MAX_LAYERS
from edgekv.models.hf.checkpoint import folder_name
from edgekv.models.hf.config_fields import ConfigFields
from edgekv.models.hf.rope import attention_scale_of_yarn, read_rope, trained_context
from edgekv.models.hf.unsupported import why_not
from edgekv.models.hf.vision import text_fields
from edgekv.spec import GQA, MLA, Experts, LayerSpec, ModelSpec, RopeLayout


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json of a model folder.

    Raises:
        ModelFileError: it is missing, or a field is missing or impossible.
        UnsupportedError: the model is sound, but EdgeKV would not compute it as it is meant.
    """
    config = text_fields(folder)
    kind = config.text("model_type")
    if kind not in FAMILIES:
        what, remedy = why_not(kind, tuple(FAMILIES))
        config.unsupported(what, remedy)
    if quantized := config.inner("quantization_config"):
        method = quantized.optional("quant_method") or "unknown"
        config.unsupported(
            f"a quantized checkpoint ({method})",
            "take the model's bfloat16 checkpoint and quantize while exporting: --weights q4_0",
        )
    config.require("mlp_bias", (False,), "a feed-forward with biases")
    n_layers = config.integer("num_hidden_layers")
    if n_layers > MAX_LAYERS:
        config.unsupported(f"a model of {n_layers} layers")
    arch, read = FAMILIES[kind]
    if kind not in _WITH_WINDOWS:
        for layer in range(n_layers):
            _require_types(config, layer, False)
    layers = tuple(read(config, i) for i in range(n_layers))
    spec = ModelSpec(
        arch=arch,
        name=folder_name(folder),
        layers=layers,
        dim=config.integer("hidden_size"),
        vocab=config.integer("vocab_size"),
        context_length=trained_context(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied_embeddings=config.flag("tie_word_embeddings", kind in _TIED),
    )
    return _scaled(spec, config)


_WITH_WINDOWS = ("mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
_TIED = ("gemma2", "gemma3_text", "minicpm3", "smollm3", "youtu")  # unless the config says otherwise


def _llama(config: ConfigFields, layer: int) -> LayerSpec:
    """Llama 2, 3 and 3.x, SmolLM 1 and 2; rows of queries and keys are permuted, see edgekv.models.hf.tensors."""
    return _swiglu(config, replace(_gqa(config, layout="interleaved"), bias=_bias(config)))


def _mistral(config: ConfigFields, layer: int) -> LayerSpec:
    """Mistral, and Ministral, which is a Mistral with a list of the layers that have the window."""
    return _swiglu(config, replace(_gqa(config, layout="interleaved"), window=_mistral_window(config, layer)))


def _qwen2(config: ConfigFields, layer: int) -> LayerSpec:
    return _swiglu(config, replace(_gqa(config), bias=True, window=_qwen_window(config, layer)))


def _qwen3(config: ConfigFields, layer: int) -> LayerSpec:
    attention = _gqa(config)
    window = _qwen_window(config, layer)
    return _swiglu(config, replace(attention, bias=_bias(config), qk_norm=True, window=window))


def _phi3(config: ConfigFields, layer: int) -> LayerSpec:
    window = config.integer("sliding_window", 0, least=0)
    _require_types(config, layer, bool(window))
    return _swiglu(config, replace(_gqa(config), window=window))


def _smollm3(config: ConfigFields, layer: int) -> LayerSpec:
    """Every fourth layer has no positions (no_rope_layers: 1 where there is RoPE)."""
    config.require("use_sliding_window", (False,), "SmolLM3 with a sliding window")
    attention = _gqa(config, layout="interleaved", theta=2e6)
    with_rope = config.values.get("no_rope_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    if isinstance(with_rope, list) and 0 < len(with_rope) <= layer:
        config.fail("no_rope_layers", "0 or 1 for every layer")
    has_rope = bool(with_rope[layer]) if isinstance(with_rope, list) and with_rope else (layer + 1) % interval
    if not has_rope:
        attention = replace(attention, rope=replace(attention.rope, dim=0))
    return _swiglu(config, replace(attention, bias=_bias(config)))


def _gemma2(config: ConfigFields, layer: int) -> LayerSpec:
    """Gemma 2 (arXiv 2408.00118): every other layer is local, starting with the first."""
    attention = _gemma_attention(config, "")
    window = _window(config, config.layer_is_local(layer, is_local(layer, LOCAL_EVERY["gemma2"])))
    return _geglu(config, replace(attention, window=window, softcap=_cap(config, "attn_logit_softcapping")))


def _gemma3(config: ConfigFields, layer: int) -> LayerSpec:
    """Gemma 3 (arXiv 2503.19786): five local layers, with a RoPE of their own, before each global one."""
    config.require("attn_logit_softcapping", (), "Gemma 3 with attention softcapping")
    config.require("use_bidirectional_attention", (False,), "attention to tokens to come")
    every = config.integer("_sliding_window_pattern", LOCAL_EVERY["gemma3"])
    every = config.integer("sliding_window_pattern", every)
    local = config.layer_is_local(layer, is_local(layer, every))
    attention = _gemma_attention(config, "sliding_attention" if local else "full_attention")
    return _geglu(config, replace(attention, qk_norm=True, window=_window(config, local)))


def _deepseek(config: ConfigFields, layer: int) -> LayerSpec:
    """DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437), and Kimi K2 (arXiv 2507.20534), which is a V3."""
    dense = config.integer("first_k_dense_replace", 0, least=0)
    config.require("moe_layer_freq", (1,), "experts in some of the layers")
    spec = _youtu(config, layer)
    return spec if layer < dense else replace(spec, experts=_experts(config))


def _glm_lite(config: ConfigFields, layer: int) -> LayerSpec:
    """GLM-4.7-Flash: a DeepSeek V3 whose config lists which layers have experts, all but the first by default."""
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        sparse = layer > 0
    elif isinstance(kinds, list) and layer < len(kinds) and kinds[layer] in ("dense", "sparse"):
        sparse = kinds[layer] == "sparse"
    else:
        config.fail("mlp_layer_types", "'dense' or 'sparse' for every layer")
    spec = _youtu(config, layer)
    return replace(spec, experts=_experts(config)) if sparse else spec


def _youtu(config: ConfigFields, layer: int) -> LayerSpec:
    """Youtu-LLM (arXiv 2512.24618): the attention of DeepSeek V3 before a dense feed-forward."""
    layout: RopeLayout = "interleaved" if config.flag("rope_interleave", True) else "half"
    return _swiglu(config, _mla(config, layout))


def _minicpm3(config: ConfigFields, layer: int) -> LayerSpec:
    return _swiglu(config, _mla(config, "half"))


def _gqa(config: ConfigFields, kind: str = "", layout: RopeLayout = "half", theta: float = 1e4) -> GQA:
    n_heads, dim = config.integer("num_attention_heads"), config.integer("hidden_size")
    n_kv_heads = config.integer("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        config.fail("num_key_value_heads", f"a divisor of {n_heads} heads")
    if config.values.get("head_dim") is None and dim % n_heads:
        config.fail("num_attention_heads", f"a divisor of hidden_size, {dim},")
    head_dim = config.integer("head_dim", dim // n_heads)
    return GQA(n_heads, n_kv_heads, head_dim, read_rope(config, head_dim, layout, kind, theta))


def _mla(config: ConfigFields, layout: RopeLayout) -> MLA:
    config.require("attention_bias", (False,), "MLA with biases")
    rope_dim, nope_dim = config.integer("qk_rope_head_dim"), config.integer("qk_nope_head_dim")
    yarn_scale = attention_scale_of_yarn(config)
    return MLA(
        n_heads=config.integer("num_attention_heads"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        value_dim=config.integer("v_head_dim"),
        rope=read_rope(config, rope_dim, layout),
        q_lora_rank=config.integer("q_lora_rank", 0, least=0),
        scale=0.0 if yarn_scale == 1.0 else yarn_scale * (nope_dim + rope_dim) ** -0.5,
    )


def _gemma_attention(config: ConfigFields, kind: str) -> GQA:
    attention = _gqa(config, kind, theta=1e6 if kind == "full_attention" else 1e4)
    scale = config.number("query_pre_attn_scalar", attention.head_dim) ** -0.5
    return replace(attention, scale=0.0 if scale == attention.head_dim**-0.5 else scale)


def _experts(config: ConfigFields) -> Experts:
    v3 = config.text("model_type") != "deepseek_v2"
    if not v3:
        config.require("norm_topk_prob", (False,), "DeepSeek-V2 with normed expert weights")
        config.require("topk_method", ("greedy", "group_limited_greedy"), "another choice of experts")
    grouped = v3 or config.values.get("topk_method") == "group_limited_greedy"
    return Experts(
        count=config.integer("n_routed_experts"),
        used=config.integer("num_experts_per_tok"),
        dim=config.integer("moe_intermediate_size"),
        shared=config.integer("n_shared_experts", 0, least=0),
        gating="sigmoid" if v3 else "softmax",
        norm_weights=v3 and config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        bias=v3,
        groups=config.integer("n_group", 1) if grouped else 1,
        used_groups=config.integer("topk_group", 1) if grouped else 1,
        group_score_of=2 if v3 else 1,
    )


def _swiglu(config: ConfigFields, attention: GQA | MLA) -> LayerSpec:
    config.require("hidden_act", ("silu", "swish"), "another activation than SiLU")
    return LayerSpec(attention, config.integer("intermediate_size"))


def _geglu(config: ConfigFields, attention: GQA) -> LayerSpec:
    config.require("attention_bias", (False,), "Gemma with biases")
    config.require("hidden_activation", ("gelu_pytorch_tanh",), "another activation than GELU (tanh)")
    return LayerSpec(attention, config.integer("intermediate_size"), "geglu", post_norms=True)


def _bias(config: ConfigFields) -> bool:
    return config.flag("attention_bias", False)


def _cap(config: ConfigFields, name: str) -> float:
    """The bound of a softcapping; 0 without one."""
    return config.number(name) if config.optional(name) else 0.0


def _window(config: ConfigFields, local: bool, default: int = 4096) -> int:
    """Tokens that a local layer attends to; the field may be left out, but null contradicts such a layer."""
    if not local:
        return 0
    if config.values.get("sliding_window", default) is None:
        config.fail("sliding_window", "a number of tokens for the layers with a window")
    return config.integer("sliding_window", default)


def _mistral_window(config: ConfigFields, layer: int) -> int:
    trained = config.integer("max_position_embeddings")
    default = 4096 if trained > 4096 else 0  # transformers' own, which says nothing within a shorter context
    size = config.integer("sliding_window", 0, least=0) if "sliding_window" in config.values else default
    if config.prefix:  # inside a model that reads pictures transformers does not look at the list
        _require_types(config, layer, bool(size))
        return size
    return _window(config, config.layer_is_local(layer, bool(size)))


def _qwen_window(config: ConfigFields, layer: int) -> int:
    on = config.flag("use_sliding_window", False)
    windowed = on and config.values.get("sliding_window", 4096) is not None
    local = config.layer_is_local(
        layer, windowed and layer >= config.integer("max_window_layers", 28, least=0)
    )
    if local and not on:
        config.unsupported("layers with a window (layer_types) that use_sliding_window turns off")
    return _window(config, local)


def _require_types(config: ConfigFields, layer: int, local: bool) -> None:
    """Refuse a list of windows that says something else than transformers, which does not look at it here."""
    if config.layer_is_local(layer, local) != local:
        config.unsupported(
            "a list of windows (layer_types) that transformers does not look at in this model type",
            "choose another model, or remove layer_types from config.json if it is wrong",
        )


def _scaled(spec: ModelSpec, config: ConfigFields) -> ModelSpec:
    """The spec with the family's scales and caps of the whole model."""
    if spec.arch == "minicpm3":
        depth = config.number("scale_depth", 1.4) / sqrt(spec.n_layers)
        base = config.integer("dim_model_base", 256)
        scale = config.number("scale_emb", 12.0)
        return replace(spec, embedding_scale=scale, residual_scale=depth, logit_scale=base / spec.dim)
    if spec.arch in ("gemma2", "gemma3"):
        cap = _cap(config, "final_logit_softcapping")
        return replace(spec, embedding_scale=sqrt(spec.dim), logit_softcap=cap)
    return spec


Reader = Callable[[ConfigFields, int], LayerSpec]
FAMILIES: Mapping[str, tuple[str, Reader]] = MappingProxyType(
    {  # model_type: (llama.cpp's architecture, reader of a layer)
        "llama": ("llama", _llama),
        "mistral": ("llama", _mistral),
        "ministral": ("llama", _mistral),
        "qwen2": ("qwen2", _qwen2),
        "qwen3": ("qwen3", _qwen3),
        "phi3": ("phi3", _phi3),
        "smollm3": ("smollm3", _smollm3),
        "gemma2": ("gemma2", _gemma2),
        "gemma3_text": ("gemma3", _gemma3),
        "deepseek_v2": ("deepseek2", _deepseek),
        "deepseek_v3": ("deepseek2", _deepseek),
        "kimi_k2": ("deepseek2", _deepseek),
        "glm4_moe_lite": ("deepseek2", _glm_lite),
        "youtu": ("deepseek2", _youtu),
        "minicpm3": ("minicpm3", _minicpm3),
    }
)
