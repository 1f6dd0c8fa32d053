"""A safetensors file written tensor by tensor, so that a model larger than RAM passes through.

The `safetensors` library's own writer wants every tensor in memory at once. The layout is eight bytes of
header length, a JSON header, the tensors' bytes end to end (huggingface/safetensors, README.md, "Format");
the library reads what this writes, and the tests have it do so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import gguf
from gguf import GGMLQuantizationType as QuantType

from edgekv.errors import InputError
from edgekv.progress import Progress
from edgekv.source import Array

DType = Literal["float32", "bfloat16", "float16"]
_STORAGE: Mapping[DType, tuple[str, int, QuantType]] = MappingProxyType(
    {  # dtype: (its name in the header, bytes a value, gguf-py's name)
        "float32": ("F32", 4, QuantType.F32),
        "bfloat16": ("BF16", 2, QuantType.BF16),
        "float16": ("F16", 2, QuantType.F16),
    }
)
FLOAT16_MAX = 65504.0
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written; `load` gives float32 of `shape`."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


def write_safetensors(path: Path, tensors: Sequence[LazyTensor], dtype: DType, progress: Progress) -> None:
    """Write tensors in one dtype, with the "format": "pt" mark that transformers asks for.

    Raises:
        InputError: a value does not fit float16.
    """
    stored, nbytes, quant = _STORAGE[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + prod(tensor.shape) * nbytes
        header[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, tensor in enumerate(tensors):
            array = tensor.load()
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            if dtype == "float16" and abs(array).max(initial=0.0) > FLOAT16_MAX:
                raise InputError(f"{tensor.name} does not fit float16; use --dtype bfloat16 or float32")
            file.write(gguf.quants.quantize(array, quant).tobytes())
            progress(i + 1, len(tensors))
