"""TensorSource: a model as named float32 tensors that are loaded one at a time.

Converting, quantizing and exporting are functions from source to source, so they compose and a model
larger than RAM passes through. Canonical tensor names are GGUF's (`blk.0.attn_q.weight`), and a matrix
has the shape (out, in): y = x @ W.T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import ModelFileError
from edgekv.spec import Metadata, ModelSpec

Array = NDArray[np.float32]


class TensorSource(Protocol):
    """A model that gives its tensors by name."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""

    @property
    def metadata(self) -> Metadata:
        """GGUF key-value pairs: the tokenizer, the chat template, the model's name and licence."""

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, in file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in numpy order, without loading it."""

    def quantization(self, name: str) -> str:
        """How the tensor is stored: a GGML type name such as "Q4_0" or "F32"."""

    def load(self, name: str) -> Array:
        """The tensor in float32. Each call reads and dequantizes anew.

        Raises:
            ModelFileError: there is no such tensor.
        """

    def raw(self, name: str) -> NDArray[np.uint8] | None:
        """The tensor's stored bytes, shape (..., bytes per row), or None where it is computed."""


class SizedSource(TensorSource, Protocol):
    """A source that knows how many bytes each tensor takes as stored."""

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""


class LazySource:
    """A source made of functions: each tensor is computed when it is asked for."""

    def __init__(self, spec: ModelSpec, metadata: Metadata) -> None:
        self.spec = spec
        self.metadata = metadata
        self._tensors: dict[str, tuple[tuple[int, ...], Callable[[], Array]]] = {}
        self._borrowed: dict[str, TensorSource] = {}

    def add(self, name: str, shape: tuple[int, ...], load: Callable[[], Array]) -> None:
        """Add a tensor that `load` computes in float32, or put it in the place of another."""
        self._tensors[name] = (shape, load)
        self._borrowed.pop(name, None)

    def add_array(self, name: str, array: Array) -> None:
        """Add a tensor that is at hand."""
        self.add(name, array.shape, lambda: array)

    def borrow(self, source: TensorSource, name: str) -> None:
        """Add a tensor of another source as it is, stored bytes and all."""
        self.add(name, source.shape(name), lambda: source.load(name))
        self._borrowed[name] = source

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[0]

    def quantization(self, name: str) -> str:
        self._entry(name)
        return self._borrowed[name].quantization(name) if name in self._borrowed else "F32"

    def raw(self, name: str) -> NDArray[np.uint8] | None:
        self._entry(name)
        return self._borrowed[name].raw(name) if name in self._borrowed else None

    def load(self, name: str) -> Array:
        shape, load = self._entry(name)
        array = load()
        assert array.shape == shape, (name, array.shape, shape)
        return array

    def _entry(self, name: str) -> tuple[tuple[int, ...], Callable[[], Array]]:
        if name not in self._tensors:
            raise no_such_tensor(self.spec.name, name)
        return self._tensors[name]


def with_tensors(
    source: TensorSource, computed: Mapping[str, Callable[[], Array]], spec: ModelSpec | None = None
) -> LazySource:
    """The source with some of its tensors computed anew, in their shapes, and perhaps another spec."""
    out = LazySource(spec or source.spec, source.metadata)
    for name in source.names():
        if name in computed:
            out.add(name, source.shape(name), computed[name])
        else:
            out.borrow(source, name)
    return out


def without(source: TensorSource, *names: str) -> LazySource:
    """The source but for some of its tensors."""
    out = LazySource(source.spec, source.metadata)
    for name in source.names():
        if name not in names:
            out.borrow(source, name)
    return out


def scaled(source: TensorSource, name: str, factor: float) -> Callable[[], Array]:
    """What loads a tensor of a source times a number."""
    return lambda: source.load(name) * np.float32(factor)


def no_such_tensor(model: str, name: str) -> ModelFileError:
    """The error for a tensor that a model, given by its path or name, does not have."""
    return ModelFileError(f"{model}: there is no tensor {name!r}; names() lists those that there are")
