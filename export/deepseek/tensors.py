"""DeepseekV3 checkpoint of a dense MLA model: config.json and tensors that unmodified transformers runs.

One thing stands between a GGUF and that format: the epsilon of the RMSNorm over the latent. transformers
takes its default of 1e-6 there, whatever the config says (modeling_deepseek_v3.py, kv_a_layernorm), vLLM and
SGLang take the config's rms_norm_eps, and the norm trick (edgekv.rewrite.norm_trick) needs the very epsilon
it was made for. So every checkpoint gets rms_norm_eps = 1e-6, exactly: with a = sqrt(1e-6 / eps),

    a*x / sqrt(mean((a*x)^2) + 1e-6) = x / sqrt(mean(x^2) + eps)

and what goes into a norm is scaled by a. That is the residual stream (the embeddings, and all that is added
to them: attn_output, ffn_down), the latent, and the queries' bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from edgekv.errors import UnsupportedError
from edgekv.export.deepseek.safetensors_file import DType, LazyTensor
from edgekv.rewrite.norm_trick import is_folded
from edgekv.rewrite.value_scales import with_balanced_values
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA, LayerSpec, ModelSpec

NORM_EPS = 1e-6
FLOAT16_NORM_GAIN = 2.0**-8  # of the attention's input; its projections undo it
FLOAT16_LATENT_GAIN = 4.0  # of the folded latent; its norm undoes it
TORCH_NAMES: dict[DType, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_BLOCK = {  # GGUF's name: DeepseekV3's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_exportable(spec: ModelSpec) -> tuple[MLA, LayerSpec]:
    """The attention and the layer that all layers share.

    Raises:
        UnsupportedError: DeepseekV3's graph does not compute such a model.
    """
    layer = spec.layers[0]
    attention = layer.attention
    if not isinstance(attention, MLA):
        raise UnsupportedError(
            f"{spec.name} has {attention.kind} attention, a DeepseekV3 checkpoint has MLA; "
            "run `edgekv convert` first, or add --healed"
        )
    odd = [what for what in spec.peculiarities if what != "low-rank queries"]
    if attention.rope.layout != "interleaved":
        odd.append("rope pairs half a head apart")
    if odd:
        raise UnsupportedError(
            f"{spec.name} has {', '.join(odd)}, which this DeepseekV3 checkpoint cannot hold; keep it as GGUF"
        )
    return attention, layer


def config(spec: ModelSpec, dtype: DType, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """config.json of a spec that passed `check_exportable`; every layer is dense.

    The expert fields describe layers that do not exist, but loaders read them.
    """
    attention, layer = check_exportable(spec)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": TORCH_NAMES[dtype],
        "torch_dtype": TORCH_NAMES[dtype],  # its name before transformers 4.56
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "intermediate_size": layer.ffn_dim,
        "num_hidden_layers": spec.n_layers,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": NORM_EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope.dim,
        "v_head_dim": attention.value_dim,
        "attention_bias": False,
        "rope_interleave": True,
        "rope_theta": attention.rope.theta,
        "rope_scaling": None,
        "first_k_dense_replace": spec.n_layers,
        "num_nextn_predict_layers": 0,
        "moe_intermediate_size": layer.ffn_dim,
        "moe_layer_freq": 1,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def tensors(source: TensorSource, dtype: DType) -> list[LazyTensor]:
    """The checkpoint's tensors, computed as they are written.

    Raises:
        UnsupportedError: see `check_exportable`.
    """
    spec = source.spec
    attention, _ = check_exportable(spec)
    if dtype == "f16":
        source = with_balanced_values(source)
    scale = float(np.sqrt(NORM_EPS / spec.norm_eps))
    # A tied head reads the scaled embeddings: the final norm undoes that.
    final = 1 / scale if spec.tied_embeddings else 1.0
    entries = [
        _scaled(source, "token_embd.weight", "model.embed_tokens.weight", scale),
        _scaled(source, "output_norm.weight", "model.norm.weight", final),
    ]
    if not spec.tied_embeddings:
        entries.append(_scaled(source, "output.weight", "lm_head.weight", 1.0))
    for i in range(spec.n_layers):
        entries += _block(source, i, attention, _factors(source, i, attention, scale, dtype))
    return entries


def _factors(
    source: TensorSource, layer: int, attention: MLA, scale: float, dtype: DType
) -> Mapping[str, float]:
    """What the tensors of a block are multiplied by, where it is not 1; "latent" and "rope_key" are the
    two parts of attn_kv_a_mqa.

    A folded latent is too small for float16, as weights and as activations. There the weights are lifted by
    shrinking the norm before them, and the latent is lifted as far as its norm stays linear to 0.1 %.
    """
    factors = dict.fromkeys(("attn_q_a", "attn_output", "ffn_down", "latent"), scale)
    if dtype != "f16":
        return factors
    rows = source.load(f"blk.{layer}.attn_kv_a_mqa.weight")
    if not is_folded(rows[: attention.kv_lora_rank]):
        return factors
    queries = "attn_q_a" if attention.q_lora_rank else "attn_q"
    return factors | {
        "attn_norm": FLOAT16_NORM_GAIN,
        queries: factors.get(queries, 1.0) / FLOAT16_NORM_GAIN,
        "latent": scale * FLOAT16_LATENT_GAIN / FLOAT16_NORM_GAIN,
        "rope_key": 1 / FLOAT16_NORM_GAIN,
        "attn_kv_a_norm": 1 / FLOAT16_LATENT_GAIN,
    }


def _block(
    source: TensorSource, layer: int, attention: MLA, factors: Mapping[str, float]
) -> list[LazyTensor]:
    ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
    present = frozenset(source.names())
    entries = [
        _scaled(source, f"{ours}{name}.weight", f"{theirs}{other}.weight", factors.get(name, 1.0))
        for name, other in _BLOCK.items()
        if f"{ours}{name}.weight" in present
    ]
    kv_a, output = f"{ours}attn_kv_a_mqa.weight", f"{ours}attn_output.weight"
    h, r = attention.n_heads, attention.kv_lora_rank
    width = h * (attention.nope_dim + attention.value_dim)
    return [
        *entries,
        LazyTensor(
            f"{theirs}self_attn.kv_a_proj_with_mqa.weight",
            source.shape(kv_a),
            partial(_compression, source, kv_a, r, factors["latent"], factors.get("rope_key", 1.0)),
        ),
        LazyTensor(f"{theirs}self_attn.kv_b_proj.weight", (width, r), partial(_joint, source, ours)),
        _scaled(source, output, f"{theirs}self_attn.o_proj.weight", factors["attn_output"]),
    ]


def _scaled(source: TensorSource, name: str, other: str, factor: float) -> LazyTensor:
    return LazyTensor(other, source.shape(name), lambda: source.load(name) * np.float32(factor))


def _compression(source: TensorSource, name: str, rank: int, latent: float, rope_key: float) -> Array:
    rows = source.load(name)  # (R + P, D)
    return np.concatenate([rows[:rank] * np.float32(latent), rows[rank:] * np.float32(rope_key)])


def _joint(source: TensorSource, prefix: str) -> Array:
    """kv_b_proj (H * (N + V), R): each head's keys, then its values."""
    k_b = source.load(f"{prefix}attn_k_b.weight")  # (H, R, N)
    v_b = source.load(f"{prefix}attn_v_b.weight")  # (H, V, R)
    return np.concatenate([k_b.swapaxes(1, 2), v_b], axis=1).reshape(-1, k_b.shape[1])
