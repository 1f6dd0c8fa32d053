"""Tensors of a Hugging Face folder as it stores them: safetensors in one file or in shards, read one tensor at a time.

Reads with plain file reads, not through a map: what passes through leaves no pages behind, so that a
checkpoint larger than RAM can be converted in little memory.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.source import Array

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_BYTE_ORDER_MARKS = (BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHUNK_VALUES = 2**17  # checked at once: they fit the processor's cache
DTYPES: Mapping[str, type[np.generic]] = MappingProxyType(  # as stored; BF16 has no numpy type of its own
    {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `offset` in bytes from its start; dtype as safetensors names it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """All tensors of a folder, by the names that the checkpoint has for them.

    Raises:
        ModelFileError: a shard is missing or malformed, or the index contradicts the shards.
        UnsupportedError: there are only pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        if (folder / SINGLE).is_file():  # before the index of an older download, as in transformers
            self._tensors = stored_tensors(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._read_index(folder / INDEX)
        else:
            raise _no_weights(folder)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def tensor(self, name: str) -> StoredTensor:
        """Raises ModelFileError if there is no such tensor."""
        if name not in self._tensors:
            raise ModelFileError(
                f"{self.folder}: tensor {name} is missing; download the model again, all of its files"
            )
        return self._tensors[name]

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as stored, one of DTYPES, in its shape; BF16 as uint16."""
        tensor = self.tensor(name)
        count = prod(tensor.shape)
        values = np.fromfile(tensor.path, DTYPES[tensor.dtype], count, offset=tensor.offset)
        if values.size != count:
            raise ModelFileError(f"{tensor.path}: was cut short inside {name}; download it again")
        return values.reshape(tensor.shape)

    def mapped(self, name: str) -> NDArray[Any]:
        """As `read`, but mapped, for bytes that are only passed on: with the array goes its memory."""
        tensor = self.tensor(name)
        if tensor.path.stat().st_size < tensor.offset + prod(tensor.shape) * DTYPES[tensor.dtype]().itemsize:
            raise ModelFileError(f"{tensor.path}: was cut short inside {name}; download it again")
        return np.memmap(tensor.path, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, in values that transformers would give one dtype."""
        tensors = self.tensor(first), self.tensor(second)
        kinds = [tensor.dtype for tensor in tensors]
        if tensors[0].shape != tensors[1].shape or not set(kinds) <= set(DTYPES):
            return False
        one, other = self.mapped(first).reshape(-1), self.mapped(second).reshape(-1)
        for start in range(0, one.size, CHUNK_VALUES):
            parts = one[start : start + CHUNK_VALUES], other[start : start + CHUNK_VALUES]
            if not np.array_equal(widen(parts[0], kinds[0]), widen(parts[1], kinds[1])):
                return False
        return True

    def _read_index(self, index: Path) -> None:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ModelFileError(f"{index}: has no weight_map; download it again")
        shards: dict[str, dict[str, StoredTensor]] = {}
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelFileError(
                    f"{index}: places {name} in {file!r}, which is no file of this folder; download it again"
                )
            if file not in shards:
                if not (self.folder / file).is_file():
                    raise ModelFileError(
                        f"{self.folder}: the shard {file} is missing; download it into the folder"
                    )
                shards[file] = stored_tensors(self.folder / file)
            if name not in shards[file]:
                raise ModelFileError(
                    f"{index}: says that {file} holds {name}, and it does not; download both again"
                )
            self._tensors[name] = shards[file][name]


def widen(values: NDArray[Any], dtype: str) -> Array:
    """Stored values of a dtype in float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no stored value is NaN or infinite, by its bits, without widening.

    Twice the bits drops the sign; what has all ones in its exponent is then largest.
    """
    bits: NDArray[Any] = values.reshape(-1).view(np.uint32 if values.dtype == np.float32 else np.uint16)
    least = {"<f4": 0xFF000000, "<u2": 0xFF00, "<f2": 0xF800}[values.dtype.str]
    return all(
        int((bits[start : start + CHUNK_VALUES] << 1).max()) < least
        for start in range(0, bits.size, CHUNK_VALUES)
    )


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies; the `safetensors` library checks the file first.

    Raises:
        ModelFileError: it is not a sound safetensors file.
    """
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: is not a sound safetensors file: {error}; download it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for name, info in header.items()
    }


def folder_name(folder: Path) -> str:
    """What a model is called: its folder, or in huggingface_hub's cache (models--OWNER--NAME/snapshots/COMMIT) NAME."""
    place = folder.resolve()
    repo = place.parent.parent.name
    if place.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.rpartition("--")[2]
    return place.name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelFileError: it is missing or not a JSON object.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_BYTE_ORDER_MARKS):
            raise ModelFileError(
                f"{path}: begins with a byte order mark, which JSON does not have; save it as UTF-8 without one "
                "(not 'UTF-8 with BOM', nor UTF-16)"
            )
        found = json.loads(data)
    except FileNotFoundError:
        raise ModelFileError(
            f"{path.parent}: there is no {path.name}; name a Hugging Face model folder or a .gguf file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}; download it again") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: is not a JSON object; download it again")
    return found


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedError for an adapter (LoRA), alone or beside a model, to which transformers would add it."""
    if (folder / ADAPTER).is_file():
        raise UnsupportedError(
            f"{folder}: holds an adapter ({ADAPTER}), which EdgeKV does not add to the model; merge it (PEFT: "
            f"merge_and_unload, then save_pretrained), or remove {ADAPTER} if that is done"
        )


def _no_weights(folder: Path) -> ModelFileError | UnsupportedError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UnsupportedError(
            f"{folder}: the weights are a Python pickle ({pickles[0]}), which can run any code when it is read; "
            "take the safetensors of the same model, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if stray:
        return ModelFileError(
            f"{folder}: has {stray[0]} but neither {SINGLE} nor {INDEX}; download the index into the folder"
        )
    return ModelFileError(f"{folder}: holds no weights; download {SINGLE} into the folder")
