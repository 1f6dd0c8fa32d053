"""EdgeKV: language models with a small KV cache for small machines.

    import edgekv

    request = edgekv.ConvertRequest("model.gguf", "small.gguf", target=0.5)
    result = edgekv.convert_model(request)
    with edgekv.open_chat(edgekv.ChatRequest("small.gguf", cache_type="q8_0")) as chat:
        print(chat.answer("Why is the sky blue?"))

Every function takes a frozen request, tells an edgekv.progress callback how far it is, and returns a result.
Nothing heavy is imported before it is used. docs/python.md describes what is listed here.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekv.errors import BackendError, EdgeKVError, InputError
    from edgekv.models.open import open_model
    from edgekv.workflows.bench import BenchRequest, bench_models
    from edgekv.workflows.chat import ChatRequest, open_chat
    from edgekv.workflows.convert import ConvertRequest, convert_model
    from edgekv.workflows.evaluate import EvaluateRequest, Measurements, evaluate_model
    from edgekv.workflows.export import (
        ExportGGUFRequest,
        ExportOnnxRequest,
        ExportSafetensorsRequest,
        export_model,
    )
    from edgekv.workflows.heal import HealRequest, heal_model
    from edgekv.workflows.hub.pull import PullRequest, pull_model
    from edgekv.workflows.pack import CheckPacksRequest, PackRequest, check_packs, pack_documents
    from edgekv.workflows.plan import PlanRequest, plan_board
    from edgekv.workflows.quantize import QuantizeRequest, quantize_model
    from edgekv.workflows.sweep import SweepRequest, sweep_models
    from edgekv.workflows.verify import VerifyRequest, verify_models

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BenchRequest",
    "ChatRequest",
    "CheckPacksRequest",
    "ConvertRequest",
    "EdgeKVError",
    "EvaluateRequest",
    "ExportGGUFRequest",
    "ExportOnnxRequest",
    "ExportSafetensorsRequest",
    "HealRequest",
    "InputError",
    "Measurements",
    "PackRequest",
    "PlanRequest",
    "PullRequest",
    "QuantizeRequest",
    "SweepRequest",
    "VerifyRequest",
    "__version__",
    "bench_models",
    "check_packs",
    "convert_model",
    "evaluate_model",
    "export_model",
    "heal_model",
    "open_chat",
    "open_model",
    "pack_documents",
    "plan_board",
    "pull_model",
    "quantize_model",
    "sweep_models",
    "verify_models",
]

_HOMES = MappingProxyType(
    {
        "edgekv.errors": ("BackendError", "EdgeKVError", "InputError"),
        "edgekv.models.open": ("open_model",),
        "edgekv.workflows.bench": ("BenchRequest", "bench_models"),
        "edgekv.workflows.chat": ("ChatRequest", "open_chat"),
        "edgekv.workflows.convert": ("ConvertRequest", "convert_model"),
        "edgekv.workflows.evaluate": ("EvaluateRequest", "Measurements", "evaluate_model"),
        "edgekv.workflows.export": (
            "ExportGGUFRequest",
            "ExportOnnxRequest",
            "ExportSafetensorsRequest",
            "export_model",
        ),
        "edgekv.workflows.heal": ("HealRequest", "heal_model"),
        "edgekv.workflows.pack": ("CheckPacksRequest", "PackRequest", "check_packs", "pack_documents"),
        "edgekv.workflows.plan": ("PlanRequest", "plan_board"),
        "edgekv.workflows.hub.pull": ("PullRequest", "pull_model"),
        "edgekv.workflows.quantize": ("QuantizeRequest", "quantize_model"),
        "edgekv.workflows.sweep": ("SweepRequest", "sweep_models"),
        "edgekv.workflows.verify": ("VerifyRequest", "verify_models"),
    }
)
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """A name of `__all__`, from the module that has it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'edgekv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
