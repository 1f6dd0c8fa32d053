"""GGUF value types and the parsed header of a file. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgekv.spec import MetaValue

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, str] = MappingProxyType(  # GGUF value type: struct code
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `dims` fastest first as GGUF has them, `offset` from the start of the file."""

    name: str
    ggml_type: str
    dims: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file but the tensors' data."""

    version: int
    metadata: Mapping[str, MetaValue]
    tensors: tuple[TensorInfo, ...]

    @property
    def mappable(self) -> bool:
        """Whether engines may use the data where a mapped file has them: ggml aborts on other offsets.

        `general.alignment` may be less than TENSOR_ALIGNMENT of ggml/src/ggml-impl.h.
        """
        return not any(tensor.offset % 32 for tensor in self.tensors)

    @property
    def n_layers(self) -> int:
        """Layers that the file says it has; 0 where it does not say."""
        count = self.metadata.get(f"{self.metadata.get('general.architecture')}.block_count")
        return count if isinstance(count, int) and count > 0 else 0

    @property
    def trained_context(self) -> int | None:
        """Tokens that the model was trained for; None where the file does not say."""
        trained = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        return trained if isinstance(trained, int) and trained > 0 else None
