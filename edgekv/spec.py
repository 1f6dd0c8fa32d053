"""What a model is, as frozen numbers, and the arithmetic of what its cache costs.

Standard library only: this module is the vocabulary that every room speaks.

Letters for shapes, used all over the code base:
    T tokens, S cached tokens, D model width, H query heads, G KV heads, K head dim,
    R latent rank (kv_lora_rank), P rope-key dims, N no-rope query dims a head, V value dims a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

CACHE_BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {  # cache type: (values a block, bytes a block); sizes from ggml/src/ggml-common.h
        "f32": (1, 4),
        "f16": (1, 2),
        "bf16": (1, 2),
        "q8_0": (32, 34),
        "q5_1": (32, 24),
        "q5_0": (32, 22),
        "q4_1": (32, 20),
        "q4_0": (32, 18),
        "iq4_nl": (32, 18),
    }
)


def cache_row_nbytes(values: int, cache_type: str) -> int:
    """Bytes of one cache row of `values` values stored as `cache_type`.

    Raises:
        ValueError: the type is unknown, or its block size does not divide `values`.
    """
    if cache_type not in CACHE_BLOCKS:
        raise ValueError(f"unknown cache type {cache_type!r}; known: {', '.join(CACHE_BLOCKS)}")
    block, nbytes = CACHE_BLOCKS[cache_type]
    if values % block:
        raise ValueError(f"{values} values do not divide into {cache_type} blocks of {block}")
    return values // block * nbytes


RopeLayout = Literal["interleaved", "half"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one attention (arXiv 2104.09864).

    `layout` says which two dims form a pair: "interleaved" (2j, 2j+1; llama.cpp's NORM) or
    "half" (j, j + dim/2; llama.cpp's NEOX). `factors` divide each pair's frequency (LongRoPE,
    arXiv 2402.13753); empty for none.
    """

    theta: float
    dim: int
    layout: RopeLayout = "interleaved"
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (arXiv 2305.13245); MHA when n_kv_heads == n_heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeSpec

    @property
    def kind(self) -> str:
        return "MHA" if self.n_kv_heads == self.n_heads else ("MQA" if self.n_kv_heads == 1 else "GQA")

    @property
    def cache_values(self) -> int:
        """Values cached for each token in one layer: K and V of every KV head."""
        return 2 * self.n_kv_heads * self.head_dim

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes one layer caches for one token; each head's row is stored on its own."""
        return 2 * self.n_kv_heads * cache_row_nbytes(self.head_dim, cache_type)

    @property
    def flops_per_cached_token(self) -> int:
        """FLOPs one decoded token spends on each cached token: scores and the weighted sum."""
        return 2 * self.n_heads * 2 * self.head_dim


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1); V is a view of the latent.

    With a `q_lora_rank` the queries come through a normed bottleneck of that width.
    """

    n_heads: int
    kv_lora_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec
    q_lora_rank: int = 0

    @property
    def kind(self) -> str:
        return "MLA"

    @property
    def head_dim(self) -> int:
        """Dims of one query head before absorption."""
        return self.nope_dim + self.rope.dim

    @property
    def cache_values(self) -> int:
        """Values cached for each token in one layer: the latent and the shared rope key."""
        return self.kv_lora_rank + self.rope.dim

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes one layer caches for one token: one row of R + P values."""
        return cache_row_nbytes(self.cache_values, cache_type)

    @property
    def flops_per_cached_token(self) -> int:
        """FLOPs one decoded token spends on each cached token, absorbed form."""
        return 2 * self.n_heads * (2 * self.kv_lora_rank + self.rope.dim)


AttentionSpec = GQA | MLA
FFNKind = Literal["swiglu", "relu_squared"]


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block: its attention, and the width and kind of its feed-forward.

    "swiglu" is arXiv 2002.05202; "relu_squared" has no gate (arXiv 2109.08668).
    """

    attention: AttentionSpec
    ffn_dim: int
    ffn: FFNKind = "swiglu"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    The scales multiply token embeddings, what each attention and feed-forward adds to the residual stream,
    and the logits (as MiniCPM has it, arXiv 2404.06395, appendix A).
    """

    arch: str
    name: str
    layers: tuple[LayerSpec, ...]
    dim: int
    vocab: int
    context_length: int
    norm_eps: float
    tied_embeddings: bool
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes that all layers together cache for one token."""
        return sum(layer.attention.kv_bytes_per_token(cache_type) for layer in self.layers)

    @property
    def cache_values(self) -> int:
        """Values that all layers together cache for one token."""
        return sum(layer.attention.cache_values for layer in self.layers)
