"""Keys of one architecture in a GGUF file, and those that EdgeKV may leave unread."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgekv.models.fields import Fields
from edgekv.spec import MetaValue

# Keys that llama.cpp takes as one number or one for each layer (get_key_or_arr in src/llama-model.cpp).
_BY_LAYER = frozenset({"attention.head_count", "attention.head_count_kv", "feed_forward_length"})
# Keys after `<arch>.` that change nothing, or nothing in a model without experts and without rope scaling.
# The epsilon is LayerNorm's, and all architectures here have RMSNorm.
_IGNORED = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
    | {"attention.layer_norm_epsilon", "leading_dense_block_count"}
    | {f"expert_{name}" for name in ("feed_forward_length", "shared_count", "weights_scale")}
    | {f"expert_{name}" for name in ("weights_norm", "gating_func", "used_count")}
)
# Keys that must have one of these values (a list: nothing else); any other makes a model that EdgeKV would compute
# wrongly.
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
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.dimension_sections": (0,),
        "expert_group_used_count": (0, 1),
        "nextn_predict_layers": (0,),
        "attention.sliding_window": (0,),
        "attention.sliding_window_pattern": (0, 1),
        "attention.shared_kv_layers": (0,),
        "attention.q_lora_rank": (0,),
        "attention.kv_lora_rank": (0,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "attn_logit_softcapping": (0.0,),
        "final_logit_softcapping": (0.0,),
        "use_parallel_residual": (False,),
        "pooling_type": (0,),  # LLAMA_POOLING_TYPE_NONE
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
        if name in _BY_LAYER and isinstance(self.optional(name), list):
            self.unsupported(f"a different {self.prefix}{name} in each layer")
        return super().integer(name, default, least)

    def optional(self, name: str) -> Any:
        """The value as it is, or None; the one number of a list that has it for each layer."""
        self._read.add(name)
        value = super().optional(name)
        if name not in _BY_LAYER or not isinstance(value, list):
            return value
        if len(value) != self.values.get("block_count"):
            self.malformed(f"{self.noun} {self.prefix}{name} has {len(value)} items, not one for each layer")
        return _one_of_equals(value)

    def reject_unknown(self, implied: Mapping[str, tuple[float, ...]]) -> None:
        """Raise UnsupportedError unless every key that was not read is one that changes nothing here.

        Args:
            implied: values by key that say what the model's other keys say already.
        """
        neutral = {**_NEUTRAL, **implied}
        if self.values.get("attention.sliding_window"):
            del neutral["attention.sliding_window_pattern"]
        for name, value in self.values.items():
            if name not in self._read | _IGNORED and not _is_one_of(value, neutral.get(name, ())):
                shown = value if isinstance(value, str | int | float) else "set"
                self.unsupported(f"a model whose {self.prefix}{name} is {shown!r}")


def _one_of_equals(value: Any) -> Any:
    """The item of a list whose items are all the same; else the value itself."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def _is_one_of(value: MetaValue, choices: tuple[MetaValue, ...]) -> bool:
    """Whether a value, or all items of a list, are one of the choices; float32's rounding aside."""
    if isinstance(value, list):
        return all(_is_one_of(item, choices) for item in value)
    numbers = [choice for choice in choices if isinstance(choice, int | float)]
    if isinstance(value, int | float):
        return any(isclose(value, number, rel_tol=1e-6) for number in numbers)
    return value in choices
