"""Typed access to the keys of one architecture in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.spec import MetaValue

# Keys after `<arch>.` that change nothing, or nothing in a model without experts and without rope scaling.
_IGNORED = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
    | {f"expert_{name}" for name in ("feed_forward_length", "shared_count", "weights_scale")}
    | {f"expert_{name}" for name in ("weights_norm", "gating_func", "used_count")}
)
# Keys that must have one of these values; any other makes a model that EdgeKV would compute wrongly.
_NEUTRAL: Mapping[str, tuple[MetaValue, ...]] = MappingProxyType(
    {
        "expert_count": (0,),
        "expert_group_count": (0, 1),
        "attention.causal": (True,),
        "rope.scaling.type": ("none", "linear"),
        "rope.scaling.factor": (0.0, 1.0),
        "rope.scale_linear": (0.0, 1.0),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_beta_fast": (32.0,),  # llama.cpp's own, whatever the key says
        "rope.scaling.yarn_beta_slow": (1.0,),
        "expert_group_used_count": (0, 1),
    }
)


class Keys:
    """Values by their key; a missing or mistyped one is an error that names it."""

    def __init__(self, metadata: Mapping[str, MetaValue], path: Path, arch: str) -> None:
        self.metadata = metadata
        self.arch = arch
        self._path = path
        self._read: set[str] = set()

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, list):
            self.unsupported(f"a different {self.arch}.{key} in each layer")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            self.fail(f"key {self.arch}.{key} is {value!r}, a whole number of at least {least} was expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (value > 0 and isfinite(value))
        ):
            self.fail(f"key {self.arch}.{key} is {value!r}, a positive number was expected")
        return float(value)

    def optional(self, key: str) -> MetaValue | None:
        """The value as it is, or None."""
        self._read.add(key)
        return self.metadata.get(f"{self.arch}.{key}")

    def reject_unknown(self) -> None:
        """Every other key of the architecture is one that changes nothing here."""
        prefix = f"{self.arch}."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._read or name in _IGNORED:
                continue
            if value not in _NEUTRAL.get(name, ()):
                shown = value if isinstance(value, str | int | float) else "set"
                self.unsupported(f"a model whose {key} is {shown!r}")

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self._path}: {problem}; download or export the file again")

    def unsupported(self, what: str) -> NoReturn:
        raise UnsupportedError(f"{self._path}: {what} is not supported; choose a plain {self.arch!r} model")

    def _get(self, key: str, default: MetaValue | None) -> MetaValue:
        self._read.add(key)
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            self.fail(f"key {self.arch}.{key} is missing")
        return value
