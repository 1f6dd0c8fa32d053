"""DeepseekV3 checkpoint of a dense MLA model: config.json and tensors that unmodified transformers runs.

One thing stands between a GGUF and that format: the epsilon of the RMSNorm over the latent. transformers
takes its default of 1e-6 there, whatever the config says (modeling_deepseek_v3.py, kv_a_layernorm), vLLM and
SGLang take the config's rms_norm_eps, and the norm trick (edgekv.rewrite.norm_trick) needs the exact epsilon
that it was computed with. So every checkpoint gets rms_norm_eps = 1e-6 (edgekv.rewrite.norm_eps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from edgekv.errors import UnsupportedError
from edgekv.export.deepseek.encoded import folded, folded_attention, is_encoded
from edgekv.export.deepseek.safetensors_file import DType, LazyTensor
from edgekv.rewrite.norm_eps import with_norm_eps
from edgekv.rewrite.norm_trick import is_folded
from edgekv.rewrite.value_scales import with_balanced_values
from edgekv.source import Array, TensorSource, scaled, with_tensors
from edgekv.spec import ENCODED, MLA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import joint_kv_b

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
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_k_b": "self_attn.kv_b_proj",  # with attn_v_b
    "attn_output": "self_attn.o_proj",
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
            f"{spec.name} has {attention.kind} attention, a DeepseekV3 checkpoint has MLA; run `edgekv convert` first "
            "(to NAME.edgekv with --kv-lora-rank, if it has biases or scaled RoPE), or add --healed"
        )
    held = {"low-rank queries"}
    remedy = "keep it as GGUF"
    if attention.encoder:
        held |= {ENCODED, "scaled RoPE frequencies", "a score scale of its own"}
        remedy = "`edgekv export onnx` writes a graph that can"
    odd = [what for what in spec.peculiarities if what not in held]
    if odd == ["layers that differ"] and attention.encoder:
        remedy = (
            f"convert with --kv-lora-rank instead of --target, which gives all layers one shape, or {remedy}"
        )
    if attention.encoder and attention.encoder.qk_norm:
        odd.append("QK-norm")
    if attention.rope.layout != "interleaved":
        odd.append("rope pairs half a head apart")
    if odd:
        raise UnsupportedError(
            f"{spec.name} has {', '.join(odd)}, which this DeepseekV3 checkpoint cannot hold; {remedy}"
        )
    return (folded_attention(attention) if attention.encoder else attention), layer


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
        "attention_bias": layer.attention != attention,  # of an encoder: queries, cached rows and outputs
        "rope_interleave": True,
        "rope_theta": attention.rope.theta,
        "rope_scaling": _rope_scaling(attention.rope, spec.context_length),
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


def _rope_scaling(rope: RopeSpec, context_length: int) -> dict[str, Any] | None:
    """Frequencies that theta alone does not set, as LongRoPE's factors, which are the same for every length."""
    if not rope.factors:
        return None
    factors = list(rope.factors)
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context_length,
    }


def tensors(source: TensorSource, dtype: DType) -> list[LazyTensor]:
    """The checkpoint's tensors, computed as they are written.

    Raises:
        UnsupportedError: see `check_exportable`; or `dtype` has not the range for an encoder.
    """
    check_exportable(source.spec)
    if is_encoded(source):
        if dtype == "f16":
            raise UnsupportedError(
                f"{source.spec.name} does not fit f16 in this format; take --weights bf16 or f32"
            )
        source = folded(source)
    if dtype == "f16":
        source = _lifted(with_balanced_values(source))
    source = with_norm_eps(source, NORM_EPS)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not source.spec.tied_embeddings:
        names["output"] = "lm_head"
    for i in range(source.spec.n_layers):
        names |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    present = frozenset(source.names())
    return [
        _tensor(source, f"{ours}.{part}", f"{theirs}.{part}")
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if f"{ours}.{part}" in present
    ]


def _tensor(source: TensorSource, ours: str, theirs: str) -> LazyTensor:
    if not ours.endswith("attn_k_b.weight"):
        return LazyTensor(theirs, source.shape(ours), partial(source.load, ours))
    values = ours.replace("attn_k_b", "attn_v_b")
    (h, r, n), (_, v, _) = source.shape(ours), source.shape(values)
    return LazyTensor(theirs, (h * (n + v), r), lambda: joint_kv_b(source.load(ours), source.load(values)))


def _lifted(source: TensorSource) -> TensorSource:
    """The source with folded latents large enough for float16, as weights and as activations.

    The weights are lifted by shrinking the norm before them, and the latent as far as its norm stays linear to 0.1 %.
    """
    computed: dict[str, Callable[[], Array]] = {}
    for i, layer in enumerate(source.spec.layers):
        attention = layer.attention
        assert isinstance(attention, MLA)
        norm, kv_a, kv_a_norm, queries = (
            f"blk.{i}.{tensor}.weight"
            for tensor in (
                "attn_norm",
                "attn_kv_a_mqa",
                "attn_kv_a_norm",
                "attn_q_a" if attention.q_lora_rank else "attn_q",
            )
        )
        rank = attention.kv_lora_rank
        if is_folded(source.load(kv_a)[:rank]):
            computed |= {
                norm: scaled(source, norm, FLOAT16_NORM_GAIN),
                queries: scaled(source, queries, 1 / FLOAT16_NORM_GAIN),
                kv_a: partial(_lifted_rows, source, kv_a, rank),
                kv_a_norm: scaled(source, kv_a_norm, 1 / FLOAT16_LATENT_GAIN),
            }
    return with_tensors(source, computed)


def _lifted_rows(source: TensorSource, name: str, rank: int) -> Array:
    rows = source.load(name) / np.float32(FLOAT16_NORM_GAIN)  # (R + P, D)
    rows[:rank] *= np.float32(FLOAT16_LATENT_GAIN)
    return rows
