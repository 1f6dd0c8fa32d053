"""What quantization does to a tensor: its error beside its own size, as it is and as its inputs weigh it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

Array = NDArray[np.float32]
CHUNK_VALUES = 2**21  # dequantized at once, of each side


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
    n_rows, columns = len(before.data), before.columns
    per_matrix = _rows_per_matrix(n_rows, columns, importance)
    sums = np.zeros(4)
    for start, stop in _chunks(n_rows, max(1, CHUNK_VALUES // columns)):
        original = before.rows(start, stop)
        squares, errors = np.square(original), np.square(original - after.rows(start, stop))
        sums[:2] += errors.sum(dtype=np.float64), squares.sum(dtype=np.float64)
        if importance is not None:
            weights = importance.reshape(-1, columns)[np.arange(start, stop) // per_matrix]
            sums[2:] += (errors * weights).sum(dtype=np.float64), (squares * weights).sum(dtype=np.float64)
    return RelativeError(_root(*sums[:2]), None if importance is None else _root(*sums[2:]))


def _rows_per_matrix(n_rows: int, columns: int, importance: Array | None) -> int:
    matrices = 1 if importance is None else importance.size // columns
    assert n_rows % matrices == 0, (n_rows, matrices)
    return n_rows // matrices


def _chunks(n_rows: int, size: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def _root(errors: float, squares: float) -> float:
    return float(np.sqrt(errors / squares)) if squares else 0.0
