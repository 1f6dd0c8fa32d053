"""Unsupported model types: the reason, and what to use instead.

Graphs: llama.cpp src/models of the release that llama-cpp-python 0.3.36 carries. Models: transformers 5.23,
src/transformers/models.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_ELSEWHERE = "llama.cpp's convert_hf_to_gguf.py makes a GGUF of it, which `edgekv quantize` takes"
_NOWHERE = "llama.cpp has no graph for it either: run it with transformers or vLLM"
_INDEXER = (
    "an indexer picks the cached tokens that a query attends to, and llama.cpp's 'deepseek2' attends to all"
)
_LINEAR = "some of its layers have linear attention, which keeps a state and no cache of tokens"
_KNOWN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # model_type: (what keeps it out, what to do)
        "deepseek_v32": (_INDEXER, _ELSEWHERE),
        "glm_moe_dsa": (_INDEXER, _ELSEWHERE),
        "kimi_linear": (_LINEAR, _ELSEWHERE),
        "glm5_next_text": (_LINEAR, _ELSEWHERE),
        "mistral4": (
            "its queries grow with their position (llama_4_scaling_beta), which EdgeKV does not compute",
            _ELSEWHERE,
        ),
        "longcat_flash": ("each layer has two attentions and experts beside them", _NOWHERE),
        "axk1": ("its experts' sum is normed, which llama.cpp's 'deepseek2' leaves out", _NOWHERE),
    }
)


def why_not(kind: str, families: tuple[str, ...]) -> tuple[str, str]:
    """What about a model type is not supported, and what to do."""
    if kind in _KNOWN:
        why, remedy = _KNOWN[kind]
        return f"model type {kind!r} ({why})", remedy
    return f"model type {kind!r}", f"EdgeKV reads {', '.join(families)}; choose one of these"
