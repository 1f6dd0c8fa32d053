"""Block rounding against gguf-py's quantizers, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from edgekv.quant.rounding import block_scales, round_blocks


def blocks_with_ties(scale: float) -> np.ndarray:
    """Blocks of 32, among them zeros, equal values, an outlier, and two largest values of opposite sign."""
    blocks = (np.random.default_rng(0).standard_normal((500, 32)) * scale).astype(np.float32)
    blocks[0] = 0
    blocks[1] = np.float32(scale)
    blocks[2, 5] *= 100
    blocks[3, [7, 9]] = np.float32(8 * scale), np.float32(-8 * scale)
    blocks[4, [7, 9]] = np.float32(-8 * scale), np.float32(8 * scale)
    return blocks


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (5, "Q5_0")])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_bit_for_bit_gguf_pys(bits: int, name: str, scale: float) -> None:
    blocks = blocks_with_ties(scale)
    codes, scales = round_blocks(blocks, bits)
    stored = gguf.quants.quantize(blocks, QuantType[name])
    found = scales.astype(np.float16)
    np.testing.assert_array_equal(found.view(np.uint8)[1:], stored[1:, :2])  # of zeros the scale is 0 there
    np.testing.assert_array_equal(
        codes * found.astype(np.float32), gguf.quants.dequantize(stored, QuantType[name])
    )


def test_the_first_of_the_largest_values_sets_the_sign() -> None:
    blocks = blocks_with_ties(1.0)
    assert block_scales(blocks, 4)[3:5, 0].tolist() == [-1.0, 1.0]


def test_double_precision_stays() -> None:
    codes, scales = round_blocks(np.linspace(-1, 1, 32)[None], 4)
    assert codes.dtype == scales.dtype == np.float64
    assert abs(codes * scales - np.linspace(-1, 1, 32)).max() <= 1 / 8
