"""Linear layers of an ONNX graph in float32, 8 or 4 bits, and the block quantization behind the last two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgekv.quant.rounding import block_scales
from edgekv.source import Array

if TYPE_CHECKING:
    from edgekv.export.onnx.graph import GraphWriter, Value

Weights = Literal["f32", "int8", "int4"]
LatentCache = Literal["f32", "int8"]
BLOCK = 32
Bits = Literal[4, 8, 32]
# MatMulNBits' accuracy_level 4: activations are rounded to 8 bits per block, for integer dot products.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """A matrix (N, K) in blocks of 32 along K: w = (q - 2^(bits - 1)) * scale, as MatMulNBits reads it."""

    bits: int
    packed: NDArray[np.uint8]  # (N, K/32, 4 * bits), two 4-bit values per byte, the first in the low half
    scales: Array  # (N, K/32)


def quantize_blocks(matrix: Array, bits: int) -> Blocks:
    """Round a matrix (N, K) to `bits` bits; K is padded to whole blocks with zeros.

    Scales are ggml's (edgekv.quant.rounding). Halves go to the even code, not up as in ggml.
    """
    n_rows, n_cols = matrix.shape
    if n_cols % BLOCK:
        matrix = np.pad(matrix, ((0, 0), (0, -n_cols % BLOCK)))
    blocks = matrix.reshape(n_rows, -1, BLOCK)
    half = 1 << (bits - 1)
    scales = block_scales(blocks, bits)
    codes = blocks / scales
    np.rint(codes, out=codes)  # in place: a token table is the largest thing in memory
    codes += half
    packed = codes.clip(0, 2 * half - 1, out=codes).astype(np.uint8)
    if bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << np.uint8(4)
    return Blocks(bits, packed, scales[..., 0])


def at_least_8(bits: Bits) -> Bits:
    """The bits of what all later tokens read: 4 are too few."""
    return 8 if bits == 4 else bits


def linear(g: GraphWriter, x: Value, name: str, matrix: Array, bits: Bits) -> Value:
    """x (..., K) times a weight (N, K) transposed."""
    if bits == 32:
        return g.op("MatMul", x, g.weight(name, matrix.T))
    blocks = quantize_blocks(matrix, bits)
    packed, scales = g.weight(f"{name}.packed", blocks.packed), g.weight(f"{name}.scales", blocks.scales)
    return _matmul_nbits(g, x, packed, scales, matrix.shape, bits)


class Embedding:
    """The token table, which may serve as the output head too without being stored twice."""

    def __init__(self, g: GraphWriter, name: str, table: Array, bits: Bits) -> None:
        self._g, self._name, self._bits = g, name, bits
        self._shape = table.shape  # (vocab, D)
        if bits == 32:
            self._rows = g.weight(name, table)
            return
        blocks = quantize_blocks(table, bits)
        self._blocks_shape = blocks.packed.shape
        # Blocks are padded: the table's rows are as wide as the blocks, not as the model.
        assert table.shape[1] % BLOCK == 0, "the width of the model is checked before"
        self._rows = g.weight(f"{name}.rows", blocks.packed.reshape(len(table), -1))
        self._scales = g.weight(f"{name}.scales", blocks.scales)

    def look_up(self, ids: Value) -> Value:
        """Rows of tokens (1, T) -> (1, T, D)."""
        if self._bits == 32:
            return self._g.op("Gather", self._rows, ids, axis=0)
        return self._g.op(
            "GatherBlockQuantized",
            *(self._rows, ids, self._scales),
            bits=self._bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, x: Value) -> Value:
        """Logits of hidden states (1, T, D): x times the table transposed."""
        g = self._g
        if self._bits == 32:
            flat = g.op("Reshape", x, g.ints(-1, self._shape[1]))
            logits = g.op("Gemm", flat, self._rows, transB=1)
            return g.op("Reshape", logits, g.ints(1, -1, self._shape[0]))
        packed = g.same_weight(f"{self._name}.packed", self._rows, self._blocks_shape)
        return _matmul_nbits(g, x, packed, self._scales, self._shape, self._bits)


def _matmul_nbits(
    g: GraphWriter, x: Value, packed: Value, scales: Value, shape: tuple[int, ...], bits: int
) -> Value:
    return g.op(
        "MatMulNBits",
        x,
        packed,
        scales,
        N=shape[0],
        K=shape[1],
        bits=bits,
        block_size=BLOCK,
        accuracy_level=ACCURACY_LEVEL,
    )
