"""A Hugging Face model folder as a TensorSource."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.hf.checkpoint import DTYPES, Checkpoint, all_finite, refuse_adapter, widen
from edgekv.models.hf.config import read_spec
from edgekv.models.hf.tensors import Recipe, recipes, with_stored_head
from edgekv.source import Array
from edgekv.spec import Metadata
from edgekv.tensors import model_tensor_shapes


class HFSource:
    """config.json, safetensors and tokenizer of a folder, its tensors under canonical names.

    Raises:
        ModelFileError: a file is missing or malformed, or tensors do not fit the config.
        UnsupportedError: EdgeKV would not compute the model as it is meant.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_adapter(folder)
        spec = read_spec(folder)
        self._checkpoint = Checkpoint(folder)
        self._recipes, unknown = recipes(self._checkpoint, spec)
        self.spec = with_stored_head(spec, self._recipes, self._checkpoint)
        self._shapes = model_tensor_shapes(self.spec)
        unknown += [name for name in self._recipes if name not in self._shapes]
        if unknown:
            raise UnsupportedError(
                f"{folder}: tensor {unknown[0]} has no place in a plain {self.spec.arch!r} model, EdgeKV would "
                "drop it; choose a model without it"
            )
        for name, shape in self._shapes.items():
            self._check(name, shape)

    @cached_property
    def metadata(self) -> Metadata:
        from edgekv.models.hf.tokenizer_json import read_tokenizer

        return {"general.name": self.spec.name} | read_tokenizer(self.folder, self.spec.vocab)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        self._recipe(name)
        return self._shapes[name]

    def quantization(self, name: str) -> str:
        return self._checkpoint.tensor(self._recipe(name).stored[0]).dtype

    def load(self, name: str) -> Array:
        recipe = self._recipe(name)
        dtype = self.quantization(name)
        array = widen(self._stored(recipe, self._checkpoint.read), dtype)
        if recipe.values:
            array = recipe.values(array)
        return array.reshape(self._shapes[name])

    def raw(self, name: str) -> NDArray[np.uint8] | None:
        """Stored bytes, where values are only reordered; vectors only in F32, which GGUF wants of them."""
        recipe = self._recipe(name)
        shape = self._shapes[name]
        if recipe.values or (len(shape) == 1 and self.quantization(name) != "F32"):
            return None
        stored = np.ascontiguousarray(self._stored(recipe, self._checkpoint.mapped)).reshape(shape)
        return stored.view(np.uint8).reshape(*shape[:-1], -1)

    def _stored(self, recipe: Recipe, read: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
        parts = [read(name) for name in recipe.stored]
        for name, part in zip(recipe.stored, parts, strict=True):
            if not all_finite(part):
                raise ModelFileError(
                    f"{self.folder}: tensor {name} holds NaN or infinite weights; download it again"
                )
        array = np.stack(parts) if recipe.stack else parts[0]
        return recipe.rows(array) if recipe.rows else array

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            raise ModelFileError(
                f"{self.folder}: tensor {name} is missing; download the model again, all of its files"
            )
        return self._recipes[name]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """The stored tensors have a dtype that is read, one among them, and as many values as `shape`."""
        recipe = self._recipe(name)
        tensors = [self._checkpoint.tensor(part) for part in recipe.stored]
        dtype = tensors[0].dtype
        for part, tensor in zip(recipe.stored, tensors, strict=True):
            if tensor.dtype not in DTYPES or tensor.dtype != dtype:
                raise UnsupportedError(
                    f"{tensor.path}: tensor {part} is stored as {tensor.dtype}; EdgeKV reads F32, F16 and BF16; "
                    "choose a checkpoint in bfloat16, or convert this one with the script its authors give"
                )
        implied = recipe.shape or (shape[1:] if recipe.stack else shape)
        if recipe.stack and len(tensors) != shape[0]:
            raise ModelFileError(
                f"{self.folder}: has {len(tensors)} experts for {name}, config.json says {shape[0]}; "
                "download the model again, all of its files"
            )
        for part, tensor in zip(recipe.stored, tensors, strict=True):
            if tensor.shape != implied:
                raise ModelFileError(
                    f"{tensor.path}: tensor {part} has shape {tensor.shape}, config.json implies {implied}; "
                    "config and weights are not of one model: download both again"
                )
