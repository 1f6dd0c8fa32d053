"""Canonical tensors of a model: their names, which are GGUF's, the shapes that a spec implies, and the way there
from the layouts of other files.

Shapes are numpy's, matrices (out, in): y = x @ W.T. Letters are those of edgekv/spec.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import GQA, MLA, Encoder, Experts, FFNKind, LayerSpec, ModelSpec

Stored = TypeVar("Stored", bound=np.generic)  # float32, or values as a file stores them


def layer_tensor_shapes(
    attention: GQA | MLA, dim: int, ffn_dim: int, ffn: FFNKind = "swiglu"
) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors, keyed by the name after `blk.<i>.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
        "ffn_up.weight": (ffn_dim, dim),
        "ffn_down.weight": (dim, ffn_dim),
    }
    if ffn != "relu_squared":
        shapes["ffn_gate.weight"] = (ffn_dim, dim)
    h = attention.n_heads
    if isinstance(attention, GQA):
        kv = attention.n_kv_heads * attention.head_dim
        if attention.bias:
            shapes |= {"attn_q.bias": (h * attention.head_dim,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if attention.qk_norm:
            shapes |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (attention.head_dim,))
        return shapes | {
            "attn_q.weight": (h * attention.head_dim, dim),
            "attn_k.weight": (kv, dim),
            "attn_v.weight": (kv, dim),
            "attn_output.weight": (dim, h * attention.head_dim),
        }
    if attention.encoder:
        return shapes | _encoded_shapes(attention, attention.encoder, dim)
    r, q_rank = attention.kv_lora_rank, attention.q_lora_rank
    if q_rank:
        shapes |= {
            "attn_q_a.weight": (q_rank, dim),
            "attn_q_a_norm.weight": (q_rank,),
            "attn_q_b.weight": (h * attention.head_dim, q_rank),
        }
    else:
        shapes["attn_q.weight"] = (h * attention.head_dim, dim)
    return shapes | {
        "attn_kv_a_mqa.weight": (attention.cache_values, dim),
        "attn_kv_a_norm.weight": (r,),
        "attn_k_b.weight": (h, r, attention.nope_dim),
        "attn_v_b.weight": (h, attention.value_dim, r),
        "attn_output.weight": (dim, h * attention.value_dim),
    }


def _encoded_shapes(mla: MLA, encoder: Encoder, dim: int) -> dict[str, tuple[int, ...]]:
    h, k, kv = mla.n_heads, encoder.head_dim, encoder.n_kv_heads * encoder.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (h * k, dim),
        "attn_k.weight": (kv, dim),
        "attn_v.weight": (kv, dim),
        "attn_kv_enc.weight": (mla.cache_values, 2 * kv),
        "attn_kv_enc.bias": (mla.cache_values,),
        "attn_q_map.weight": (h, mla.cache_values, k),
        "attn_v_b.weight": (h, mla.value_dim, mla.kv_lora_rank),
        "attn_output.weight": (dim, h * mla.value_dim),
        "attn_output.bias": (dim,),
    }
    if encoder.bias:
        shapes |= {"attn_q.bias": (h * k,), "attn_k.bias": (kv,)}
    if encoder.qk_norm:
        shapes |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (k,))
    return shapes


def block_tensor_shapes(layer: LayerSpec, dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a block, experts and norms included, keyed by the name after `blk.<i>.`."""
    shapes = layer_tensor_shapes(layer.attention, dim, layer.ffn_dim, layer.ffn)
    if layer.post_norms:
        shapes |= dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (dim,))
    if layer.experts:
        for kind in ("gate", "up", "down"):
            del shapes[f"ffn_{kind}.weight"]
        shapes |= _expert_shapes(layer.experts, dim)
    return shapes


def _expert_shapes(experts: Experts, dim: int) -> dict[str, tuple[int, ...]]:
    n, f, shared = experts.count, experts.dim, experts.shared * experts.dim
    shapes: dict[str, tuple[int, ...]] = {"ffn_gate_inp.weight": (n, dim)}
    if experts.bias:
        shapes["exp_probs_b.bias"] = (n,)
    for kind in ("gate", "up", "down"):
        shapes[f"ffn_{kind}_exps.weight"] = (n, dim, f) if kind == "down" else (n, f, dim)
        if shared:
            shapes[f"ffn_{kind}_shexp.weight"] = (dim, shared) if kind == "down" else (shared, dim)
    return shapes


def model_tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all canonical tensors of a model, in file order."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocab, spec.dim)}
    for i, layer in enumerate(spec.layers):
        block = block_tensor_shapes(layer, spec.dim)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (spec.dim,)
    if not spec.tied_embeddings:
        shapes["output.weight"] = (spec.vocab, spec.dim)
    return shapes


def looked_up(spec: ModelSpec) -> frozenset[str]:
    """Tensors of which a decoded token reads a single row: a token table that is not the output head too."""
    return frozenset() if spec.tied_embeddings else frozenset({"token_embd.weight"})


def weight_flops(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """FLOPs per token of all matrices among `shapes`: a product and a sum per weight."""
    skipped = looked_up(spec)
    return 2 * sum(prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name not in skipped)


def read_nbytes(spec: ModelSpec, sizes: Mapping[str, int]) -> int:
    """Weight bytes that a decoded token reads, of tensors that take `sizes` bytes."""
    return sum(sizes.values()) - sum(sizes[name] for name in looked_up(spec))


def keys_of_kv_b(kv_b: NDArray[Stored], mla: MLA) -> NDArray[Stored]:
    """attn_k_b (H, R, N) of a joint up-projection (H * (N + V), R), which has each head's keys before its values."""
    heads = kv_b.reshape(mla.n_heads, mla.nope_dim + mla.value_dim, -1)
    return np.ascontiguousarray(heads[:, : mla.nope_dim].swapaxes(1, 2))


def values_of_kv_b(kv_b: NDArray[Stored], mla: MLA) -> NDArray[Stored]:
    """attn_v_b (H, V, R) of a joint up-projection (H * (N + V), R)."""
    return np.ascontiguousarray(
        kv_b.reshape(mla.n_heads, mla.nope_dim + mla.value_dim, -1)[:, mla.nope_dim :]
    )


def joint_kv_b(k_b: NDArray[Stored], v_b: NDArray[Stored]) -> NDArray[Stored]:
    """The joint up-projection (H * (N + V), R) of attn_k_b (H, R, N) and attn_v_b (H, V, R)."""
    return np.concatenate([k_b.swapaxes(1, 2), v_b], axis=1).reshape(-1, k_b.shape[1])


def with_neighbouring_pairs(rows: NDArray[Stored], n_heads: int, rope_dim: int) -> NDArray[Stored]:
    """RoPE pairs from halves to neighbours: rows j and j + P/2 of each head's last P become 2j and 2j + 1.

    `rows` (H * K, ...) is a weight or a bias that writes queries or keys; the scores stay what they are, as long as
    both are reordered and RoPE is told ("interleaved" instead of "half").
    """
    heads = rows.reshape(n_heads, -1, *rows.shape[1:])
    first, middle = heads.shape[1] - rope_dim, heads.shape[1] - rope_dim // 2
    out = np.array(heads)
    out[:, first::2], out[:, first + 1 :: 2] = heads[:, first:middle], heads[:, middle:]
    return out.reshape(rows.shape)
