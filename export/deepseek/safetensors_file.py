"""Writer of safetensors files, tensor by tensor, so that a model larger than RAM passes through.

The `safetensors` library's own writer wants every tensor in memory at once. The layout is eight bytes of
header length, a JSON header, the tensors' bytes end to end (huggingface/safetensors, README.md, "Format");
the library reads what this writes, and the tests have it do so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import gguf
from gguf import GGMLQuantizationType as QuantType

from edgekv.errors import InputError
from edgekv.progress import Progress
from edgekv.quant.formats import FORMATS
from edgekv.source import Array

DType = Literal["f32", "bf16", "f16"]
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
        InputError: a value does not fit f16.
    """
    stored, nbytes = FORMATS[dtype].name.upper(), FORMATS[dtype].block_nbytes
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
            if dtype == "f16" and abs(array).max(initial=0.0) > FLOAT16_MAX:
                raise InputError(f"{tensor.name} does not fit f16; use --weights bf16 or f32")
            file.write(gguf.quants.quantize(array, QuantType[stored]).tobytes())
            progress(i + 1, len(tensors))
