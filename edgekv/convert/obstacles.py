"""What keeps a model from being converted to MLA, why, and what its user can do.

A converted model is a dense `deepseek2` in llama.cpp (src/models/deepseek2.cpp): what that graph lacks has no
place to go.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgekv.spec import MLA, ModelSpec

_AS_IT_IS = "use the model as it is (edgekv export gguf), with a q8_0 cache if memory is short"
_TRIM = (
    "if a shorter context will do, set max_position_embeddings to the window and sliding_window to null in "
    "config.json"
)
_AVOIDABLE = ("a sliding window", "layers that differ")  # some have windows, and the others have not
_WHY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # of ModelSpec.peculiarities: (why, what to do)
        "QK-norm": (
            "each head's keys are normed behind their up-projection, which therefore cannot be absorbed into the "
            "queries: every cached token would have to be decompressed",
            _AS_IT_IS,
        ),
        "biases on queries, keys and values": (
            "a key's bias is rotated with the key, and a deepseek2 graph has no place for it",
            _AS_IT_IS,
        ),
        "a sliding window": ("a deepseek2 graph attends to all tokens", _TRIM),
        "attention softcapping": ("a deepseek2 graph does not cap scores", _AS_IT_IS),
        "layers without RoPE": ("a deepseek2 graph rotates in every layer", _AS_IT_IS),
        "scaled RoPE frequencies": (
            "a deepseek2 graph takes its frequencies from rope theta alone, or from YaRN",
            _AS_IT_IS,
        ),
        "experts": ("only attention in front of a dense feed-forward is converted", _AS_IT_IS),
    }
)


def obstacle(spec: ModelSpec) -> str | None:
    """Why the model cannot be converted and what to do, or None if it can.

    What a user can take away is named only where nothing else stands in the way.
    """
    if isinstance(spec.layers[0].attention, MLA):
        return f"{spec.name} already has MLA; convert takes a GQA or MHA model"
    found = spec.peculiarities
    lasting = [name for name in found if name not in _AVOIDABLE]
    name = next((name for name in _WHY if name in lasting), lasting[0] if lasting else None)
    if name is None and spec.layers[0].attention.rope.layout != "interleaved":
        return f"{spec.name} ({spec.arch}) pairs dims for RoPE by halves, which convert does not read; {_AS_IT_IS}"
    name = name or next(iter(found), None)
    if name is None:
        return None
    why, remedy = _WHY.get(name, ("a deepseek2 graph does not compute it", _AS_IT_IS))
    return f"{spec.name} has {name} and cannot become MLA: {why}; {remedy}"
