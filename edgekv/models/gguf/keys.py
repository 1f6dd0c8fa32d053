"""Keys of one architecture in a GGUF file, and those that EdgeKV may leave unread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgekv.models.fields import Fields
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


class Keys(Fields):
    """The values of `<arch>.<name>`, by name; remembers which were read."""

    noun = "key"
    file_remedy = "download another GGUF of the model, or make one with llama.cpp's convert_hf_to_gguf.py"

    def __init__(self, metadata: Mapping[str, MetaValue], path: Path, arch: str) -> None:
        prefix = f"{arch}."
        values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        super().__init__(values, path, prefix)
        self.arch = arch
        self._read: set[str] = set()

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number below 2^31, the same in all layers."""
        if isinstance(self.optional(name), list):
            self.unsupported(f"a different {self.prefix}{name} in each layer")
        return super().integer(name, default, least)

    def optional(self, name: str) -> Any:
        """The value as it is, or None."""
        self._read.add(name)
        return super().optional(name)

    def reject_unknown(self) -> None:
        """Raise UnsupportedError unless every key that was not read is one that changes nothing here."""
        for name, value in self.values.items():
            if name not in self._read | _IGNORED and value not in _NEUTRAL.get(name, ()):
                shown = value if isinstance(value, str | int | float) else "set"
                self.unsupported(f"a model whose {self.prefix}{name} is {shown!r}")
