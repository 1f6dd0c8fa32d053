"""Descriptions of a model: its shape, the bytes of its cache, and the conversions that are open to it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from edgekv.backends.llama_cpp.footprint import cache_nbytes, default_ubatch, graph_window
from edgekv.convert.target import choose_rank, obstacle
from edgekv.errors import InputError
from edgekv.host.memory import machine_nbytes
from edgekv.models.open import open_model
from edgekv.quant.formats import COMMON_CACHES
from edgekv.spec import GQA, MLA, ModelSpec

CONTEXTS = (2048, 8192, 32768)
TARGETS = (0.75, 0.667, 0.5, 0.334, 0.25)


def describe_model(path: Path) -> dict[str, Any]:
    """Everything that `edgekv inspect` prints, as plain values. Cache sizes are in bytes, as llama.cpp allocates them.

    Raises:
        InputError: as `edgekv.models.open.open_model` does.
    """
    source = open_model(path)
    spec = source.spec
    attention = spec.layers[0].attention
    sizes = {name: math.prod(source.shape(name)) for name in source.names()}
    mix: Counter[str] = Counter()
    for name, size in sizes.items():
        mix[source.quantization(name)] += size
    return {
        "name": spec.name,
        "architecture": spec.arch,
        "attention": attention.kind,
        "n_layers": spec.n_layers,
        "dim": spec.dim,
        "n_heads": attention.n_heads,
        "ffn_dim": spec.layers[0].ffn_dim,
        "vocab": spec.vocab,
        "context_length": spec.context_length,
        "tied_embeddings": spec.tied_embeddings,
        "parameters": sum(sizes.values()),
        "quantization": dict(mix.most_common()),
        "shape": _attention_shape(spec),
        "cache": _cache(spec),
        "peculiarities": list(spec.peculiarities),
        "could_become": _targets(spec),
        "obstacle": obstacle(spec, unscaled=True) if isinstance(attention, GQA) else None,
        "made_by": {key: value for key, value in source.metadata.items() if key.startswith("edgekv.")},
    }


def _attention_shape(spec: ModelSpec) -> dict[str, float]:
    attention = spec.layers[0].attention
    if isinstance(attention, MLA):
        shape: dict[str, float] = {
            "kv_lora_rank": attention.kv_lora_rank,
            "rope_dim": attention.rope.dim,
            "nope_dim": attention.nope_dim,
            "value_dim": attention.value_dim,
        }
    else:
        shape = {"n_kv_heads": attention.n_kv_heads, "head_dim": attention.head_dim}
    return shape | {"rope_theta": attention.rope.theta}


def _cache(spec: ModelSpec) -> dict[str, Any]:
    n_ubatch = default_ubatch(machine_nbytes())
    windows = [graph_window(spec, layer.attention) for layer in spec.layers]
    per_token: dict[str, int] = {}
    for kind in COMMON_CACHES:
        try:
            per_token[kind] = spec.kv_bytes_per_token(kind)
        except ValueError:  # the block size does not divide the rows: llama.cpp refuses this type too
            continue
    return {
        "values_per_token_per_layer": spec.cache_values / spec.n_layers,
        "bytes_per_token": per_token,
        "bytes": {
            kind: {str(n): cache_nbytes(spec, kind, n, n_ubatch) for n in CONTEXTS} for kind in per_token
        },
        "window": max(windows),
        "layers_with_window": sum(window > 0 for window in windows),
    }


def _targets(spec: ModelSpec) -> list[dict[str, Any]]:
    """The latents that `convert --target` would choose; none for a model that cannot be converted."""
    attention = spec.layers[0].attention
    if not isinstance(attention, GQA) or obstacle(spec, unscaled=True):
        return []
    found = []
    for target in TARGETS:
        try:
            rank, rope_dim = choose_rank(attention, target)
        except InputError:
            continue
        found.append(
            {
                "target": target,
                "kv_lora_rank": rank,
                "rope_dim": rope_dim,
                "values_per_token_per_layer": rank + rope_dim,
                "kept": (rank + rope_dim) / attention.cache_values,
            }
        )
    return found
