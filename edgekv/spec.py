"""Specs of models as frozen numbers, and the bytes and FLOPs that their caches cost.

Standard library only: this module is the vocabulary that every room speaks.

Letters for shapes, used all over the code base:
    T tokens, S cached tokens, D model width, H query heads, G KV heads, K head dim,
    R latent rank (kv_lora_rank), P rope-key dims, N no-rope query dims per head, V value dims per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgekv.quant.cache_format import CacheFormat

MetaValue = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]
Metadata = Mapping[str, MetaValue]  # GGUF key-value pairs
RopeLayout = Literal["interleaved", "half"]
MAX_ROPE_DIM = (
    4096  # of a head: what a file may claim before its tensors are looked at; models have up to 256
)


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow frequencies are divided by `factor`, fast ones kept, with a ramp between.

    The ramp lies between the pairs that turn `beta_fast` and `beta_slow` times in `original_context` tokens.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one attention (arXiv 2104.09864); `dim` 0 for an attention without positions.

    `layout` says which two dims form a pair: "interleaved" (2j, 2j+1; llama.cpp's NORM) or
    "half" (j, j + dim/2; llama.cpp's NEOX). `factors` divide each pair's frequency (LongRoPE,
    arXiv 2402.13753; Llama 3's scaling); empty for none. `magnitude` multiplies what is rotated.
    """

    theta: float
    dim: int
    layout: RopeLayout = "interleaved"
    factors: tuple[float, ...] = ()
    yarn: Yarn | None = None
    magnitude: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether theta alone sets the frequencies."""
        return not self.factors and self.yarn is None and self.magnitude == 1.0


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (arXiv 2305.13245); MHA when n_kv_heads == n_heads.

    bias: queries, keys and values have one. qk_norm: each head's query and key pass RMSNorm before RoPE.
    window: tokens each query sees, itself included; 0 for all. scale: of the scores, 0 for 1/sqrt(head_dim).
    softcap: c of c * tanh(score / c), 0 for none (arXiv 2408.00118, section 2).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeSpec
    bias: bool = False
    qk_norm: bool = False
    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0

    @property
    def score_scale(self) -> float:
        """What every score is multiplied by."""
        return self.scale or self.head_dim**-0.5

    @property
    def kind(self) -> str:
        return "MHA" if self.n_kv_heads == self.n_heads else ("MQA" if self.n_kv_heads == 1 else "GQA")

    @property
    def cache_values(self) -> int:
        """Values cached for each token in one layer: K and V of every KV head."""
        return 2 * self.n_kv_heads * self.head_dim

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes one layer caches for one token; ValueError where the type's blocks do not divide a head."""
        return CacheFormat.parse(cache_type).kv_nbytes(self.n_kv_heads, self.head_dim, self.head_dim)

    @property
    def flops_per_cached_token(self) -> int:
        """FLOPs one decoded token spends on each cached token: scores and the weighted sum."""
        return 2 * self.n_heads * 2 * self.head_dim


@dataclass(frozen=True)
class Encoder:
    """Keys and values that are made first, as GQA makes them, and encoded when they are written.

    With keys k and values v of all KV heads, k behind its bias and norm but before RoPE, a cached row is
    E [k; v] + e: its first R values the latent, its last P the rope key. Reading stays linear, so that a head's
    query, a matrix times what the original's would be before RoPE, scores rows as they lie in the cache. There is no
    bias on values: attention weights sum to one, so that it leaves through the output's bias.

    bias: queries and keys have one. qk_norm: each head's query and key pass RMSNorm.
    """

    n_kv_heads: int
    head_dim: int
    bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1); V is a view of the latent.

    With a `q_lora_rank` the queries come through a normed bottleneck of that width. scale: of the scores,
    0 for 1/sqrt(head_dim). Without an `encoder` the latent is a normed linear map of the input. window, softcap: as
    GQA has them.
    """

    n_heads: int
    kv_lora_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec
    q_lora_rank: int = 0
    scale: float = 0.0
    encoder: Encoder | None = None
    window: int = 0
    softcap: float = 0.0

    @property
    def score_scale(self) -> float:
        """What every score is multiplied by."""
        return self.scale or self.head_dim**-0.5

    @property
    def kind(self) -> str:
        return "MLA"

    @property
    def head_dim(self) -> int:
        """Dims of one query head before absorption."""
        return self.encoder.head_dim if self.encoder else self.nope_dim + self.rope.dim

    @property
    def cache_values(self) -> int:
        """Values cached for each token in one layer: the latent and the shared rope key."""
        return self.kv_lora_rank + self.rope.dim

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes one layer caches for one token: one row of R + P values; ValueError where the type cannot hold it."""
        return CacheFormat.parse(cache_type).latent_nbytes(self.cache_values, self.kv_lora_rank)

    @property
    def flops_per_cached_token(self) -> int:
        """FLOPs one decoded token spends on each cached token, absorbed form."""
        return 2 * self.n_heads * (2 * self.kv_lora_rank + self.rope.dim)


AttentionSpec = GQA | MLA
ENCODED = "an encoder of keys and values"  # of ModelSpec.peculiarities
FFNKind = Literal["swiglu", "geglu", "relu_squared"]
Gating = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Experts:
    """A mixture of SwiGLU experts beside shared ones that see every token (arXiv 2401.06066, 2412.19437).

    count: routed experts, of which each token gets `used`, drawn from the best `used_groups` of `groups`.
    dim: width of an expert; the shared ones are one of `shared * dim`. gating: from router scores to weights.
    norm_weights: the chosen weights sum to 1, before `scale`. bias: added to weights for the choice alone.
    """

    count: int
    used: int
    dim: int
    shared: int
    gating: Gating = "softmax"
    norm_weights: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    used_groups: int = 1
    group_score_of: int = 2  # a group's score is the sum of its best experts', this many


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block: its attention, and the width and kind of its feed-forward.

    "swiglu" and "geglu" are arXiv 2002.05202; "relu_squared" has no gate (arXiv 2109.08668). With `experts`
    the feed-forward is theirs and ffn_dim means nothing. post_norms: what attention and feed-forward give is
    normed before it is added (arXiv 2408.00118).
    """

    attention: AttentionSpec
    ffn_dim: int
    ffn: FFNKind = "swiglu"
    post_norms: bool = False
    experts: Experts | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    The scales multiply token embeddings, what each attention and feed-forward adds to the residual stream,
    and the logits (as MiniCPM has it, arXiv 2404.06395, appendix A). logit_softcap: c of c * tanh(logit / c).
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
    logit_softcap: float = 0.0

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def kv_bytes_per_token(self, cache_type: str) -> int:
        """Bytes that all layers together cache for one token in a type such as "q8_0", or "q8_0/q4_0" for K and V.

        Raises:
            ValueError: the type is unknown, or cannot hold this model's cache.
        """
        return sum(layer.attention.kv_bytes_per_token(cache_type) for layer in self.layers)

    @property
    def cache_values(self) -> int:
        """Values that all layers together cache for one token."""
        return sum(layer.attention.cache_values for layer in self.layers)

    @property
    def peculiarities(self) -> tuple[str, ...]:
        """What sets the model apart from a plain Llama (or a plain dense MLA), in words.

        Code that knows only the plain block has to refuse a model with any of these.
        """
        layers = set(self.layers)
        attentions = [layer.attention for layer in layers]
        gqa = [attention for attention in attentions if isinstance(attention, GQA)]
        ropes = [attention.rope for attention in attentions]
        scales = (self.embedding_scale, self.residual_scale, self.logit_scale)
        found = {
            "biases on queries, keys and values": any(a.bias for a in gqa),
            "QK-norm": any(a.qk_norm for a in gqa),
            ENCODED: any(isinstance(a, MLA) and a.encoder for a in attentions),
            "a sliding window": any(a.window for a in attentions),
            "attention softcapping": any(a.softcap for a in attentions),
            "a score scale of its own": any(a.scale for a in attentions),
            "layers without RoPE": any(not rope.dim for rope in ropes),
            "scaled RoPE frequencies": any(not rope.is_plain for rope in ropes),
            "layers that differ": len(layers) > 1,
            "low-rank queries": any(isinstance(a, MLA) and a.q_lora_rank for a in attentions),
            "another feed-forward than SwiGLU": any(layer.ffn != "swiglu" for layer in layers),
            "norms after attention and feed-forward": any(layer.post_norms for layer in layers),
            "experts": any(layer.experts for layer in layers),
            "scaled embeddings, residuals or logits": any(scale != 1.0 for scale in scales),
            "logit softcapping": bool(self.logit_softcap),
        }
        return tuple(name for name, there in found.items() if there)
