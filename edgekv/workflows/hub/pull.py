"""Models of the Hugging Face Hub: fetched into huggingface_hub's cache, and what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekv.models.hub.client import CachedModel, cache_folder, cached_models
from edgekv.models.hub.pull import Pulled, pull
from edgekv.progress import Stages, silent
from edgekv.workflows.request import Request

__all__ = ["CachedModel", "PullRequest", "Pulled", "list_models", "pull_model"]


@dataclass(frozen=True)
class PullRequest(Request):
    """What to fetch. `model`: hf:OWNER/NAME, with :QUANT or :FILE behind it if EdgeKV is not to choose."""

    model: str


def pull_model(request: PullRequest, progress: Stages = silent) -> Pulled:
    """Fetch a model of the Hub that is not in the cache yet, and say where it lies.

        pulled = edgekv.pull_model(edgekv.PullRequest("hf:OWNER/NAME:Q4_K_M"))
        print(pulled.path, pulled.commit)

    Raises:
        InputError: no such model, no such file in it, it is gated, the Hub cannot be reached, a hash is wrong.
        OutputError: the disk has no room for it.
        BackendError: huggingface_hub is not installed.
    """
    return pull(request.model, progress)


def list_models() -> tuple[Path, list[CachedModel]]:
    """The folder of the cache, and every model that is whole in it, the largest first.

    Raises:
        BackendError: huggingface_hub is not installed.
    """
    return cache_folder(), cached_models()
