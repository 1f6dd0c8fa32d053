"""Q6_K in NumPy, which gguf-py reads and does not write: 6.56 bits per weight.

Source: block_q6_K and quantize_row_q6_K_ref of ggml/src/ggml-common.h and ggml-quants.c in llama.cpp. 256 weights
share a 16-bit scale, each 16 of them an 8-bit multiple of it, and a weight is a multiple of that from -32 to 31.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.quant.formats import FORMATS

Array = NDArray[np.float32]
BLOCK, GROUP = FORMATS["q6_k"].block, 16
BLOCK_BYTES = FORMATS["q6_k"].block_nbytes  # 128 of low bits, 64 of high bits, 16 scales, one scale of scales
CHUNK_BLOCKS = 4096
# Where the largest weight of a group may land: the range's end, where it is exact, and places near it.
LARGEST = np.linspace(-33.0, -29.0, 9, dtype=np.float32)


def quantize_q6_k(array: Array) -> NDArray[np.uint8]:
    """Bytes of the blocks, shape (blocks, 210), of an array whose size is a multiple of 256, in row-major order.

    A block may cross rows, which GGUF tensors do not allow.

    Raises:
        ValueError: the size is no multiple of 256.
    """
    if array.size % BLOCK:
        raise ValueError(f"{array.size} weights are no multiple of {BLOCK}")
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, BLOCK)
    out = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        out[start : start + CHUNK_BLOCKS] = _quantize(blocks[start : start + CHUNK_BLOCKS])
    return out


def _quantize(blocks: Array) -> NDArray[np.uint8]:
    n = len(blocks)
    groups = blocks.reshape(n, BLOCK // GROUP, GROUP)
    wanted = _scales(groups)
    largest = np.take_along_axis(wanted, np.abs(wanted).argmax(1, keepdims=True), 1)
    common = (largest / -128).astype(np.float16)
    scales = np.clip(np.rint(wanted * _inverse(common.astype(np.float32))), -128, 127).astype(np.int8)
    step = common.astype(np.float32) * scales
    q = (np.clip(np.rint(groups * _inverse(step)[..., None]), -32, 31) + 32).astype(np.uint8)
    # Of each half block, four runs of 32: low bits of runs 1 and 3 and of 2 and 4 share bytes, high bits of all four.
    runs = q.reshape(n, 2, 4, 32)
    low, high = runs & 0x0F, runs >> 4
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.concatenate(
        [
            (low[:, :, :2] | low[:, :, 2:] << 4).reshape(n, 128),
            np.bitwise_or.reduce(high << shifts, axis=2).reshape(n, 64),
            scales.view(np.uint8),
            common.view(np.uint8),
        ],
        axis=1,
    )


def _scales(groups: Array) -> Array:
    """The scale of each group, shape (n, 16), with the least squared error among those tried."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2, keepdims=True), 2)[..., 0]
    best = np.zeros_like(largest)
    gained = np.zeros_like(largest)  # squared error without a scale less that with the best so far
    for place in LARGEST:
        q = np.clip(np.rint(groups * (place * _inverse(largest))[..., None]), -32, 31)
        dot, square = (q * groups).sum(2), (q * q).sum(2)
        gain = dot * dot * _inverse(square)
        better = gain > gained
        best = np.where(better, dot * _inverse(square), best)
        gained = np.where(better, gain, gained)
    return best


def _inverse(values: Array) -> Array:
    """1 / value, and 0 for 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)
