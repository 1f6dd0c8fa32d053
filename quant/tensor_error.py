"""The error that quantization makes in a tensor: relative to the tensor's size, plain and weighed by its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

Array = NDArray[np.float32]
CHUNK_VALUES = 2**15  # of each tensor, dequantized at once: they fit the CPU's cache
SAMPLE_CHUNKS = 24  # of a larger tensor, evenly spread: 786,432 values are compared


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes: data (rows of all matrices, bytes per row), a GGML type name, columns per row."""

    data: NDArray[np.uint8]
    ggml_type: str
    columns: int
    matrices: int = 1

    def rows(self, start: int, stop: int) -> Array:
        """Some rows in float32.

        Raises:
            NotImplementedError: gguf-py cannot read the type.
        """
        return np.asarray(
            gguf.quants.dequantize(self.data[start:stop], QuantType[self.ggml_type]), np.float32
        )


@dataclass(frozen=True)
class RelativeError:
    """Root of (sum of squared errors / sum of squares).

    weighted: both sums weigh each column with the mean square of its input, so that it is the relative error
    of the tensor's output on uncorrelated inputs; None where no inputs were measured.
    """

    rms: float
    weighted: float | None
    compared: float  # share of the rows


def relative_error(before: StoredTensor, after: StoredTensor, importance: Array | None) -> RelativeError:
    """Compare a tensor with its quantized self; importance (matrices * columns,) as llama.cpp has it.

    Raises:
        NotImplementedError: gguf-py cannot read one of the types.
    """
    columns, n_rows = before.columns, len(before.data) // before.matrices  # of one matrix
    sums = np.zeros((2, before.matrices, columns))  # errors and squares
    compared = 0
    for start, stop in compared_rows((before.matrices, n_rows, columns)):
        original = before.rows(start, stop)
        difference = original - after.rows(start, stop)
        sums[0, start // n_rows] += np.square(difference, out=difference).sum(axis=0)
        sums[1, start // n_rows] += np.square(original, out=difference).sum(axis=0)
        compared += stop - start
    errors, squares = sums
    weighted = None
    if importance is not None:
        weights = importance.reshape(before.matrices, columns)
        weighted = _root(float((errors * weights).sum()), float((squares * weights).sum()))
    rms = _root(float(errors.sum()), float(squares.sum()))
    return RelativeError(rms, weighted, compared / len(before.data))


def compared_rows(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows (start, stop) to compare of a tensor (..., rows, columns), counted over its matrices.

    All rows, or evenly spread ones of a large tensor.
    """
    *outer, columns = shape
    n_rows, n_matrices = (outer[-1], prod(outer[:-1])) if outer else (1, 1)
    step = max(1, CHUNK_VALUES // columns)
    starts = [m * n_rows + row for m in range(n_matrices) for row in range(0, n_rows, step)]
    if len(starts) > SAMPLE_CHUNKS:
        starts = [starts[i] for i in np.linspace(0, len(starts) - 1, SAMPLE_CHUNKS).round().astype(int)]
    return [(start, min(start + step, (start // n_rows + 1) * n_rows)) for start in starts]


def _root(errors: float, squares: float) -> float:
    return float(np.sqrt(errors / squares)) if squares else 0.0
