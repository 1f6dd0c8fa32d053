"""Teacher (GQA) and student (MLA) as functions of one block, in PyTorch.

Every block of a model has the same shapes, so one function compiled once serves all of them: compile
time does not grow with depth. Weights are stacked over layers; a block gets its slices.

The student is computed in the naive form (keys and values rebuilt per head), which costs training far less
than the absorbed form and lets it use flash attention. Its latent is linear: the RMSNorm that MLA graphs
apply to it is made an identity by the norm trick (edgekv/heal/weights.py folds it in and out).

Cost of one training token, SmolLM2-135M (D=576, 30 layers, F=1536, vocab 49152), rank 96 + 32, 1024 tokens
per sequence, in MFLOP (2 per multiply-add; causal attention counted half):

    teacher forward   212 blocks + 57 head + 35 attention                                   = 304
    student forward   208 blocks + 57 head + 35 attention                                   = 300
    student backward  208 + 57 to the inputs, 49 to the attention weights, 88 attention     = 402

1.0 GFLOP per token. An H100 that reaches 450 TFLOP/s in the GEMMs and 250 in attention needs 2.5 us;
reading and writing activations that no GEMM hides (about 3 MB at 3 TB/s) adds 1.0 us: 285K tokens/s was
predicted, 302K measured (108 ms for 32768 tokens: teacher 23, student forward 25, logits 15, backward 45;
17 GB; 13 s to compile; torch 2.11, H100 80GB HBM3).

Memory at a micro-batch of T tokens, in bytes (A trained values, W all weights, two bytes each in bf16):
2W + 16A (master, gradient, two moments) + T * layers * (18D + 6F) saved activations + 1.6 GB of logits.
Llama-3.2-1B (D=2048, 16 layers, F=8192) on a 24 GB card: 2.5 + 2.7 + 8192 * 16 * 86 KB = 11.3 + 1.6,
18 GB at micro-batches of 8192 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.heal.cache_rounding import straight_through
from edgekv.heal.recipe import CacheType
from edgekv.spec import GQA, MLA

Function = TypeVar("Function", bound=Callable[..., object])


def without_gradient(function: Function) -> Function:
    """torch.no_grad() as a decorator that keeps the type."""
    wrapped: Function = torch.no_grad()(function)
    return wrapped


class GQAWeights(NamedTuple):
    """One teacher block. Norms float32, matrices compute dtype."""

    attn_norm: Tensor  # (D,)
    qkv: Tensor  # (H*K + 2*G*K, D)
    output: Tensor  # (D, H*K)
    ffn_norm: Tensor  # (D,)
    gate_up: Tensor  # (2F, D)
    down: Tensor  # (D, F)


class MLAWeights(NamedTuple):
    """One student block; trained tensors are float32 masters, the others are the teacher's own."""

    attn_norm: Tensor  # (D,)
    q: Tensor  # (H*(N+P), D), each head nope first
    kv_a: Tensor  # (R+P, D), latent rows first, without norm scaling
    k_b: Tensor  # (H, R, N)
    v_b: Tensor  # (H, V, R)
    output: Tensor  # (D, H*V)
    ffn_norm: Tensor  # (D,)
    gate_up: Tensor  # (2F, D)
    down: Tensor  # (D, F)


class Rope(NamedTuple):
    """Tables of one attention, each (T, pairs), float32."""

    cos: Tensor
    sin: Tensor


def rope_tables(n_tokens: int, theta: float, dim: int, device: torch.device) -> Rope:
    """cos and sin of position * theta^(-2j/dim), computed in float64."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(n_tokens, dtype=torch.float64)[:, None] * inv_freq
    return Rope(angle.cos().float().to(device), angle.sin().float().to(device))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Interleaved RoPE (arXiv 2104.09864) of x (B, T, heads, P)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[: x.shape[1], None], rope.sin[: x.shape[1], None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm (arXiv 1910.07467) in float32, given back as `dtype`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (B, T, H, K), k (B, T, G, K), v (B, T, G, V) -> (B, T, H*V).

    Flash kernels want equal head dims: the narrower side is padded with zeros, which changes nothing.
    """
    width, value_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)[..., :value_dim].flatten(-2)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU feed-forward (arXiv 2002.05202); x (B, T, D)."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def gqa_heads(x: Tensor, w: GQAWeights, rope: Rope, spec: GQA) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's rotated queries (B, T, H, K), rotated keys and values (B, T, G, K) of normed x (B, T, D)."""
    h, g, p = spec.n_heads, spec.n_kv_heads, spec.rope.dim
    heads = F.linear(x, w.qkv).unflatten(-1, (h + 2 * g, spec.head_dim))
    rotated = rotate(heads[:, :, : h + g, :p], rope)
    if p < spec.head_dim:
        rotated = torch.cat((rotated, heads[:, :, : h + g, p:]), -1)
    return rotated[:, :, :h], rotated[:, :, h:], heads[:, :, h + g :]


def mla_attention(x: Tensor, w: MLAWeights, rope: Rope, spec: MLA, cache_type: CacheType) -> Tensor:
    """The student's attention of normed x (B, T, D), naive form, after its output projection."""
    h, r, n, p, v = spec.n_heads, spec.kv_lora_rank, spec.nope_dim, spec.rope.dim, spec.value_dim
    projected = F.linear(x, torch.cat((w.q, w.kv_a)).to(x.dtype))
    q, row = projected.split((h * (n + p), r + p), -1)
    q = q.unflatten(-1, (h, n + p))
    q = torch.cat((q[..., :n], rotate(q[..., n:], rope)), -1)
    latent = straight_through(row[..., :r], cache_type)
    k_rope = straight_through(rotate(row[..., None, r:], rope), cache_type)  # the cache holds rotated keys
    up = torch.cat((w.k_b.transpose(1, 2).flatten(0, 1), w.v_b.flatten(0, 1)))  # (H*N + H*V, R)
    k_nope, value = F.linear(latent, up.to(x.dtype)).split((h * n, h * v), -1)
    k = torch.cat((k_nope.unflatten(-1, (h, n)), k_rope.expand(-1, -1, h, -1)), -1)
    mixed = causal_attention(q, k, value.unflatten(-1, (h, v)), spec.head_dim**-0.5)
    return F.linear(mixed, w.output.to(x.dtype))


TeacherBlock = Callable[[Tensor, GQAWeights, Rope], tuple[Tensor, Tensor, Tensor]]
StudentBlock = Callable[[Tensor, MLAWeights, Rope], Tensor]
MatchBlock = Callable[[Tensor, Tensor, MLAWeights, Rope], Tensor]


def teacher_block(spec: GQA, eps: float, dtype: torch.dtype) -> TeacherBlock:
    """A function x -> (next x, normed input of attention, attention output).

    The last two are intermediate results that phase 1 trains on.
    """

    def block(x: Tensor, w: GQAWeights, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        normed = rms_norm(x, w.attn_norm, eps, dtype)
        mixed = causal_attention(*gqa_heads(normed, w, rope, spec), spec.head_dim**-0.5)
        attended = F.linear(mixed, w.output)
        x = x + attended
        x = x + swiglu(rms_norm(x, w.ffn_norm, eps, dtype), w.gate_up, w.down)
        return x, normed, attended

    return block


def student_block(spec: MLA, eps: float, dtype: torch.dtype, cache_type: CacheType) -> StudentBlock:
    """A function x -> next x."""

    def block(x: Tensor, w: MLAWeights, rope: Rope) -> Tensor:
        x = x + mla_attention(rms_norm(x, w.attn_norm, eps, dtype), w, rope, spec, cache_type)
        normed = rms_norm(x, w.ffn_norm, eps, dtype)
        return x + swiglu(normed, w.gate_up.to(dtype), w.down.to(dtype))

    return block


def match_block(spec: MLA, cache_type: CacheType) -> MatchBlock:
    """A function (normed x, teacher's attention output) -> |student - teacher|^2 / |teacher|^2."""

    def block(normed: Tensor, target: Tensor, w: MLAWeights, rope: Rope) -> Tensor:
        error = mla_attention(normed, w, rope, spec, cache_type).float() - target.float()
        return error.square().sum() / target.float().square().sum()

    return block
