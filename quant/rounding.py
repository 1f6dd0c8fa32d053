"""Block rounding of ggml's q4_0 and q5_0 in NumPy: one signed scale per block, of which all values are multiples.

Source: quantize_row_q4_0_ref and quantize_row_q5_0_ref of ggml/src/ggml-quants.c in llama.cpp.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = TypeVar("Floats", NDArray[np.float32], NDArray[np.float64])


def block_scales(blocks: Floats, bits: int) -> Floats:
    """The scale of each block (..., n), shape (..., 1), for signed codes of `bits` bits; 1 for a block of zeros.

    The value of largest magnitude, the first of several, becomes the lowest code exactly: no code is wasted.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    return np.where(largest == 0, blocks.dtype.type(1), largest / blocks.dtype.type(-(1 << (bits - 1))))


def round_blocks(blocks: Floats, bits: int) -> tuple[Floats, Floats]:
    """Signed codes of blocks (..., n) as ggml rounds them, and their scales (..., 1), still in full precision.

    ggml keeps the scales in float16 and reads codes * scales.
    """
    half, scales = 1 << (bits - 1), block_scales(blocks, bits)
    codes = np.trunc(blocks * (1 / scales) + blocks.dtype.type(half + 0.5)).clip(0, 2 * half - 1)
    return codes - half, scales
