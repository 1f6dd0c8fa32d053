"""Models in numbers (size, FLOPs, cache), as reports hold them and plans compute with them."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from edgekv.backends.llama_cpp.footprint import graph_window
from edgekv.devices.reporting.report import CacheInfo, ModelInfo
from edgekv.files import file_sha256
from edgekv.models.gguf.spec import JOINT_KV_B
from edgekv.models.onnx.folder import MANIFEST
from edgekv.models.onnx.manifest import Manifest
from edgekv.quant.cache_format import CacheFormat
from edgekv.source import SizedSource
from edgekv.spec import MLA, ModelSpec
from edgekv.tensors import read_nbytes, weight_flops


def describe_model(source: SizedSource, path: Path, with_hash: bool = True) -> ModelInfo:
    """Everything a report says about a model file. `with_hash` reads the whole file."""
    spec = source.spec
    shapes = {name: source.shape(name) for name in source.names()}
    stored = {name: source.nbytes(name) for name in source.names()}
    attention = {layer.attention.kind for layer in spec.layers}
    return ModelInfo(
        file=path.name,
        sha256=file_sha256(path) if with_hash else None,
        name=spec.name,
        arch=spec.arch,
        attention="+".join(sorted(attention)),
        n_layers=spec.n_layers,
        n_params=sum(map(prod, shapes.values())),
        quantization=main_quantization(source),
        weights_nbytes=sum(stored.values()),
        read_nbytes=read_nbytes(spec, stored),
        flops=weight_flops(spec, shapes),
        flops_per_cached_token=sum(layer.attention.flops_per_cached_token for layer in spec.layers),
        context_length=spec.context_length,
    )


def describe_onnx(manifest: Manifest, folder: Path, n_ctx: int) -> tuple[ModelInfo, CacheInfo]:
    """The same of a folder that `edgekv export onnx` wrote; the hash is its manifest's, which lists the others."""
    about = manifest.model
    model = ModelInfo(
        file=folder.name,
        sha256=file_sha256(folder / MANIFEST),
        name=about.name,
        arch=about.arch,
        attention=about.attention,
        n_layers=about.n_layers,
        n_params=about.n_params,
        quantization=about.weights,
        weights_nbytes=about.weights_nbytes,
        read_nbytes=about.read_nbytes,
        flops=about.flops,
        flops_per_cached_token=about.flops_per_cached_token,
        context_length=about.context_length,
    )
    windowed = [layer for layer in about.layers if layer.window]
    cache = CacheInfo(
        type=about.cache_type,
        values_per_token=about.cache_values,
        nbytes_per_token=about.cache_nbytes,
        n_ctx=n_ctx,
        window=max((layer.window for layer in windowed), default=None),
        window_nbytes_per_token=sum(layer.nbytes for layer in windowed) or None,
    )
    return model, cache


def describe_cache(spec: ModelSpec, cache_type: str, n_ctx: int | None) -> CacheInfo:
    """The cache's arithmetic; raises ValueError if the type does not fit the model's dims."""
    attentions = [layer.attention for layer in spec.layers]
    windows = [graph_window(spec, attention) for attention in attentions]
    held = sum(a.kv_bytes_per_token(cache_type) for a, w in zip(attentions, windows, strict=True) if w)
    return CacheInfo(
        type=cache_type,
        values_per_token=spec.cache_values,
        nbytes_per_token=spec.kv_bytes_per_token(cache_type),
        n_ctx=n_ctx,
        window=max(windows) or None,
        window_nbytes_per_token=held or None,
    )


def describe_llama_cache(spec: ModelSpec, cache_type: str, n_ctx: int | None) -> CacheInfo:
    """The cache as llama.cpp keeps it: minicpm3 and plm with the keys and values of every head, not the latent.

    Raises:
        ValueError: the type does not fit the model's dims.
    """
    if spec.arch not in JOINT_KV_B:
        return describe_cache(spec, cache_type, n_ctx)
    values = nbytes = 0
    for layer in spec.layers:
        attention = layer.attention
        assert isinstance(attention, MLA)
        heads, width_k, width_v = attention.n_heads, attention.head_dim, attention.value_dim
        values += heads * (width_k + width_v)
        nbytes += CacheFormat.parse(cache_type).kv_nbytes(heads, width_k, width_v)
    return CacheInfo(cache_type, values, nbytes, n_ctx)


def main_quantization(source: SizedSource) -> str:
    """The type that holds the most bytes; others that hold over a tenth follow it."""
    by_type: Counter[str] = Counter()
    for name in source.names():
        by_type[source.quantization(name)] += source.nbytes(name)
    total = sum(by_type.values())
    return "+".join(
        kind for i, (kind, size) in enumerate(by_type.most_common()) if i == 0 or size > total / 10
    )
