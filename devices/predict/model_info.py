"""A model's size, work and cache in numbers: what reports carry and plans compute with."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Protocol

from edgekv.devices.reporting.report import CacheInfo, ModelInfo
from edgekv.models.gguf.spec import JOINT_KV_B
from edgekv.models.onnx.manifest import MANIFEST, Manifest
from edgekv.source import TensorSource
from edgekv.spec import MLA, ModelSpec, cache_row_nbytes


class SizedSource(TensorSource, Protocol):
    """A source that knows how many bytes each tensor takes as stored."""

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""


def describe_model(source: SizedSource, path: Path, with_hash: bool = True) -> ModelInfo:
    """Everything a report says about a model file. `with_hash` reads the whole file."""
    spec = source.spec
    sizes = {name: _count(source.shape(name)) for name in source.names()}
    stored = {name: source.nbytes(name) for name in source.names()}
    # One row of an untied embedding is looked up for a token; a tied one is read whole as the output head.
    skipped = set() if spec.tied_embeddings else {"token_embd.weight"}
    matrices = [name for name in sizes if len(source.shape(name)) > 1 and name not in skipped]
    attention = {layer.attention.kind for layer in spec.layers}
    return ModelInfo(
        file=path.name,
        sha256=file_sha256(path) if with_hash else None,
        name=spec.name,
        arch=spec.arch,
        attention="+".join(sorted(attention)),
        n_layers=spec.n_layers,
        n_params=sum(sizes.values()),
        quantization=main_quantization(source, stored),
        weights_nbytes=sum(stored.values()),
        read_nbytes=sum(size for name, size in stored.items() if name not in skipped),
        flops=2 * sum(sizes[name] for name in matrices),
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
    return model, CacheInfo(about.cache_type, about.cache_values, about.cache_nbytes, n_ctx)


def describe_cache(spec: ModelSpec, cache_type: str, n_ctx: int | None) -> CacheInfo:
    """The cache's arithmetic; raises ValueError if the type does not fit the model's dims."""
    return CacheInfo(cache_type, spec.cache_values, spec.kv_bytes_per_token(cache_type), n_ctx)


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
        for dim in (attention.head_dim, attention.value_dim):
            values += attention.n_heads * dim
            nbytes += cache_row_nbytes(attention.n_heads * dim, cache_type)
    return CacheInfo(cache_type, values, nbytes, n_ctx)


def main_quantization(source: TensorSource, stored: dict[str, int]) -> str:
    """The type that holds the most bytes; others that hold over a tenth follow it."""
    by_type: Counter[str] = Counter()
    for name, size in stored.items():
        by_type[source.quantization(name)] += size
    total = sum(by_type.values())
    return "+".join(
        kind for i, (kind, size) in enumerate(by_type.most_common()) if i == 0 or size > total / 10
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
