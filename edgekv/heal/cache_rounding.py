"""Rounding of cached rows to llama.cpp's block formats, as a straight-through operation of PyTorch.

The forward pass sees exactly what ggml stores and reads back (ggml/src/ggml-quants.c,
quantize_row_q8_0_ref, quantize_row_q5_0_ref and quantize_row_q4_0_ref: blocks of 32 values with one f16
scale); the backward pass sees the identity (straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from edgekv.heal.recipe import CacheType
from edgekv.quant.formats import FORMATS

BLOCK = FORMATS["q4_0"].block


def q8_0(x: Tensor) -> Tensor:
    """Round trip of (..., n * 32) float32 values through q8_0: d = max|x| / 127."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    whole = scaled.abs().floor()  # C's roundf: halves away from zero, unlike torch.round
    rounded = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()
    return (rounded * d.half().float()).flatten(-2)


def _from_largest(x: Tensor, half: int) -> Tensor:
    """Round trip through 2 * half levels, d = (value of largest magnitude) / -half: q5_0 with 16, q4_0 with 8.

    Of two values with equal magnitude and opposite sign ggml takes the first, this the positive one.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    d = torch.where(high >= -low, high, low) / -half
    levels = (blocks * _inverse(d) + (half + 0.5)).trunc().clamp(max=2 * half - 1)
    return ((levels - half) * d.half().float()).flatten(-2)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": q8_0,
    "q5_0": partial(_from_largest, half=16),
    "q4_0": partial(_from_largest, half=8),
}


def straight_through(x: Tensor, cache_type: CacheType) -> Tensor:
    """x as the cache of this type would give it back; the gradient passes as if nothing had happened."""
    if cache_type == "f16":
        return x
    exact = x.float()
    return (exact + (ROUND_TRIPS[cache_type](exact) - exact).detach()).to(x.dtype)
