"""What quantization does to a tensor: its error beside its own size, as it is and as its inputs weigh it."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

Array = NDArray[np.float32]
CHUNK_VALUES = 2**18  # dequantized at once, of each side: what fits the cache is quick


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes: data (rows, bytes a row), a GGML type name, and how many columns a row has."""

    data: NDArray[np.uint8]
    ggml_type: str
    columns: int

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


def relative_error(before: StoredTensor, after: StoredTensor, importance: Array | None) -> RelativeError:
    """Compare a tensor with its quantized self; importance (matrices * columns,) as llama.cpp has it.

    Raises:
        NotImplementedError: gguf-py cannot read one of the types.
    """
    columns = before.columns
    weights = np.ones((1, columns)) if importance is None else importance.reshape(-1, columns)
    n_rows = len(before.data) // len(weights)  # of one matrix
    sums = np.zeros((2, len(weights), columns))  # errors and squares
    for matrix in range(len(weights)):
        for start in range(matrix * n_rows, (matrix + 1) * n_rows, max(1, CHUNK_VALUES // columns)):
            stop = min(start + max(1, CHUNK_VALUES // columns), (matrix + 1) * n_rows)
            original = before.rows(start, stop)
            difference = original - after.rows(start, stop)
            sums[0, matrix] += np.square(difference, out=difference).sum(axis=0)
            sums[1, matrix] += np.square(original, out=difference).sum(axis=0)
    errors, squares = sums
    weighted = (
        None
        if importance is None
        else _root(float((errors * weights).sum()), float((squares * weights).sum()))
    )
    return RelativeError(_root(float(errors.sum()), float(squares.sum())), weighted)


def _root(errors: float, squares: float) -> float:
    return float(np.sqrt(errors / squares)) if squares else 0.0
