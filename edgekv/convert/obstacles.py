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
BIASES = "biases on queries, keys and values"
_WHY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # of ModelSpec.peculiarities: (why, what to do)
        "QK-norm": (
            "each head's keys are normed behind their up-projection, which therefore cannot be absorbed into the "
            "queries: every cached token would have to be decompressed",
            _AS_IT_IS,
        ),
        BIASES: (
            "a key's bias is rotated with the key, and a deepseek2 graph has no place for it",
            f"edgekv convert --fold-biases writes them into the weights, nearly, and says how nearly; or {_AS_IT_IS}",
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


def obstacle(spec: ModelSpec, fold_biases: bool = False) -> str | None:
    """Why the model cannot be converted and what to do, or None if it can.

    What a user can take away is named only where nothing else stands in the way.
    """
    if isinstance(spec.layers[0].attention, MLA):
        return f"{spec.name} already has MLA; convert takes a GQA or MHA model"
    found = [what for what in spec.peculiarities if not (fold_biases and what == BIASES)]
    if not found:
        return None
    lasting = [what for what in found if what not in _AVOIDABLE] or found
    name = next((name for name in _WHY if name in lasting), lasting[0])
    why, remedy = _WHY.get(name, ("a deepseek2 graph does not compute it", _AS_IT_IS))
    return f"{spec.name} has {name} and cannot become MLA: {why}; {remedy}"
