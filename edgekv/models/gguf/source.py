"""A GGUF file as a TensorSource: checked, mapped, and dequantized tensor by tensor with gguf-py."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.layout import TensorInfo
from edgekv.models.gguf.spec import ROPE_FACTORS, ROPE_FREQS, spec_from_gguf, with_rope_factors
from edgekv.source import Array, no_such_tensor
from edgekv.spec import Metadata


class GGUFSource:
    """A mapped GGUF file of one of edgekv.models.gguf.spec.ARCHITECTURES, its tensors under the file's own names.

    Where those are not the canonical ones, edgekv.models.open.open_model gives these.

    The header is read by edgekv.models.gguf.header: gguf-py's own reader makes an array of every token and merge,
    which takes seconds and 100 MB and more.

    Raises:
        ModelFileError: the file is malformed, or tensors or keys are missing or contradict each other.
        UnsupportedError: the architecture is not handled.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path = path
        self.metadata: Metadata = header.metadata
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self.spec = spec_from_gguf(self.metadata, {n: self.shape(n) for n in self._tensors}, path)
        self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        for name in (ROPE_FREQS, ROPE_FACTORS[0]):
            if name in self._tensors:
                self.spec = with_rope_factors(self.spec, self.load(name).tolist())

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).dims[::-1]

    def quantization(self, name: str) -> str:
        return self._entry(name).ggml_type

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return self._entry(name).nbytes

    def load(self, name: str) -> Array:
        stored = self.quantization(name)
        try:
            with np.errstate(all="ignore"):
                array = gguf.quants.dequantize(self.raw(name), gguf.GGMLQuantizationType[stored])
                # Finite if and only if all values are: float64 cannot overflow here. Needs no mask in memory.
                total = array.sum(dtype=np.float64)
        except (KeyError, NotImplementedError):
            raise UnsupportedError(
                f"{self.path}: tensor {name} is stored as {stored}, which gguf-py cannot read; quantize the "
                "model to another type with llama-quantize"
            ) from None
        if not np.isfinite(total):
            raise ModelFileError(
                f"{self.path}: tensor {name} holds NaN or infinite weights; download the file again, or take another"
            )
        return np.asarray(array, dtype=np.float32).reshape(self.shape(name))

    def raw(self, name: str) -> NDArray[np.uint8]:
        tensor = self._entry(name)
        rows = self.shape(name)[:-1]
        return self._data[tensor.offset : tensor.offset + tensor.nbytes].reshape(*rows, -1)

    def _entry(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise no_such_tensor(str(self.path), name)
        return self._tensors[name]
