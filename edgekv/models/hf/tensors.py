"""Recipes of the canonical tensors: which stored ones make up each, and what has to be done to them.

Names are mapped by gguf-py (gguf/tensor_mapping.py). Almost everything is a choice of rows, which works on
stored bytes as well as on values, so that a checkpoint passes through bit by bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekv.models.hf.checkpoint import Checkpoint
from edgekv.models.hf.vision import text_name
from edgekv.source import Array
from edgekv.spec import GQA, MLA, ModelSpec
from edgekv.tensors import keys_of_kv_b, values_of_kv_b, with_neighbouring_pairs

Rows = Callable[[NDArray[Any]], NDArray[Any]]
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Recipe:
    """A canonical tensor: the stored ones, stacked if there are several, after `rows` and `values`.

    rows: chooses or reorders along the first axes, whatever the last one holds. values: on float32.
    shape: of a stored tensor, if it is another than the canonical one's, or in a stack than an item's of it.
    """

    stored: tuple[str, ...]
    rows: Rows | None = None
    values: Callable[[Array], Array] | None = None
    shape: tuple[int, ...] = ()
    stack: bool = False


def recipes(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[dict[str, Recipe], list[str]]:
    """Every canonical tensor that the checkpoint's names give, and the names that have no place."""
    found: dict[str, Recipe] = {}
    unknown: list[str] = []
    experts: dict[str, dict[int, str]] = {}
    mapping = gguf.get_tensor_name_map(_ARCHS[spec.arch], spec.n_layers)
    for name in checkpoint.names():
        plain = text_name(name)
        if plain is None or _has_no_use(plain, spec):
            continue
        if match := _EXPERT.fullmatch(plain):
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = name
            continue
        known = plain.replace("e_score_correction_bias", "e_score_correction.bias")
        mapped = mapping.get_name(known, try_suffixes=(".weight", ".bias"))
        if plain == "lm_head.weight":  # some of gguf-py's architectures have none of their own
            mapped = _HEAD
        if mapped is None:
            unknown.append(name)
        else:
            found.update(_canonical(mapped, name, spec))
    for name, parts in experts.items():
        mapped = mapping.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, name
        found[mapped] = Recipe(tuple(parts[i] for i in sorted(parts)), stack=True)
    return found, unknown


def with_stored_head(spec: ModelSpec, found: dict[str, Recipe], checkpoint: Checkpoint) -> ModelSpec:
    """The spec that fits the head and the embedding that are stored, as in transformers 5 (`tie_weights`).

    A tied model may hold either or the same twice, and `found` loses the second; two that differ, which a merged
    adapter leaves behind, are two, whatever config.json says.
    """
    if not spec.tied_embeddings or _HEAD not in found:
        return spec
    head, embedding = found[_HEAD], found.setdefault(_EMBEDDING, found[_HEAD])
    if head is not embedding and not checkpoint.same(head.stored[0], embedding.stored[0]):
        return replace(spec, tied_embeddings=False)
    del found[_HEAD]
    return spec


def _has_no_use(name: str, spec: ModelSpec) -> bool:
    """Buffers that are computed anew, layers that predict tokens further on."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    layer = _LAYER.match(name)
    return spec.arch == "deepseek2" and layer is not None and int(layer[1]) >= spec.n_layers


def _canonical(mapped: str, name: str, spec: ModelSpec) -> Iterator[tuple[str, Recipe]]:
    """Canonical tensors of one stored tensor, given the name that gguf-py has for it."""
    if not mapped.startswith("blk."):
        plus_one = _plus_one if spec.arch.startswith("gemma") and mapped == "output_norm.weight" else None
        yield mapped, Recipe((name,), values=plus_one)
        return
    block, _, tensor = mapped[4:].partition(".")
    layer, prefix = spec.layers[int(block)], f"blk.{block}."
    attention = layer.attention
    if isinstance(attention, MLA) and tensor == "attn_kv_b.weight":
        joint = (attention.n_heads * (attention.nope_dim + attention.value_dim), attention.kv_lora_rank)
        keys, values = partial(keys_of_kv_b, mla=attention), partial(values_of_kv_b, mla=attention)
        yield f"{prefix}attn_k_b.weight", Recipe((name,), values=keys, shape=joint)
        yield f"{prefix}attn_v_b.weight", Recipe((name,), rows=values, shape=joint)
    elif isinstance(attention, GQA) and tensor == "attn_qkv.weight":
        q, kv = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
        for kind, start, stop in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            rows = partial(_slice, start, stop)
            yield f"{prefix}attn_{kind}.weight", Recipe((name,), rows=rows, shape=(q + 2 * kv, spec.dim))
    elif spec.arch == "phi3" and tensor == "ffn_up.weight":
        f = layer.ffn_dim
        for kind, start in (("gate", 0), ("up", f)):
            rows = partial(_slice, start, start + f)
            yield f"{prefix}ffn_{kind}.weight", Recipe((name,), rows=rows, shape=(2 * f, spec.dim))
    elif spec.arch in ("llama", "smollm3") and re.fullmatch(r"attn_[qk]\.(weight|bias)", tensor):
        assert isinstance(attention, GQA)
        n_heads = attention.n_heads if tensor[5] == "q" else attention.n_kv_heads
        # transformers rotates halves, llama.cpp's llama neighbours
        rows = partial(with_neighbouring_pairs, n_heads=n_heads, rope_dim=attention.head_dim)
        yield mapped, Recipe((name,), rows=rows)
    elif spec.arch.startswith("gemma") and tensor.endswith("norm.weight"):
        yield mapped, Recipe((name,), values=_plus_one)
    else:
        yield mapped, Recipe((name,))


def _slice(start: int, stop: int, rows: NDArray[Any]) -> NDArray[Any]:
    return rows[start:stop]


def _plus_one(weight: Array) -> Array:
    """Gemma's norms multiply by 1 + weight."""
    return weight + np.float32(1)
