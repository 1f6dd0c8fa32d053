"""Serving a model over HTTP, as OpenAI's API has it, or layers of one to a chat on another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekv.backends.base import require_positive
from edgekv.backends.open import Kind, default_kind
from edgekv.cache.policies.names import DEFAULT_POLICY, LayerBudgets
from edgekv.cache.policies.settings import wanted_eviction
from edgekv.errors import BackendError, InputError
from edgekv.host.threads import default_threads
from edgekv.serve.settings import ServerSettings
from edgekv.workflows.request import Request

__all__ = [
    "ServeRequest",
    "ServerSettings",
    "WorkerRequest",
    "default_parallel",
    "serve_layers",
    "serve_model",
]

PARALLEL = 4


@dataclass(frozen=True)
class ServeRequest(Request):
    """A server to run.

    Attributes:
        model: a GGUF file, or a folder that `edgekv export onnx` wrote.
        settings: where it listens, who may ask, and its limits.
        backend: by default the one that reads the model's format.
        ctx_size: tokens of one request and its answer; by default the trained length, but at most 4096.
        cache_type: how their keys and values are stored; by default f16 in llama.cpp.
        threads: by default the big physical cores.
        budget, policy, layers: as edgekv.workflows.chat.ChatRequest has them; one request at a time then.
        packs: a folder of packs that requests can name.
        sessions: a folder for what the cache lets go of, in at most `sessions_bytes`; it is made where it is missing.
    """

    model: Path
    settings: ServerSettings = field(default_factory=ServerSettings)
    backend: Kind | None = None
    ctx_size: int | None = None
    cache_type: str | None = None
    threads: int | None = None
    budget: int | None = None
    policy: str = DEFAULT_POLICY
    layers: LayerBudgets = "uniform"
    packs: Path | None = None
    sessions: Path | None = None
    sessions_bytes: int = 2**30


def default_parallel(model: Path, backend: Kind | None, budget: int | None = None) -> int:
    """Requests side by side where nobody says: one in engines other than llama.cpp, and in a cache that evicts."""
    return PARALLEL if (backend or default_kind(model)) == "llama.cpp" and budget is None else 1


def serve_model(
    request: ServeRequest, ready: Callable[[str, dict[str, Any]], None], tell: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is called with the address once requests are taken, `tell` with words on
    other servers.

    Raises:
        InputError: an option is impossible, the address cannot be listened on, the file is malformed or unsupported,
            or does not fit in memory.
        BackendError: the engine is not installed or failed, or the server's libraries are not installed.
    """
    try:
        from edgekv.serve.engine_process import Options
        from edgekv.serve.run import run
    except ImportError as error:
        raise BackendError(f"the server is not installed; pip install 'edgekv[serve]' [{error}]") from error
    require_positive(
        ctx_size=request.ctx_size, threads=request.threads, sessions_bytes=request.sessions_bytes
    )
    if request.budget is not None and (request.packs or request.sessions):
        raise InputError(
            "packs and sessions hold every token, which a budget would evict; leave --budget out, or them"
        )
    if request.budget is not None and request.settings.shares:
        raise InputError(
            "servers exchange rows of every token, which a budget would evict; leave --budget out, or --peer"
        )
    options = Options(
        path=str(request.model),
        kind=request.backend,
        n_parallel=request.settings.parallel,
        n_ctx=request.ctx_size,
        cache_type=request.cache_type,
        n_threads=request.threads,
        eviction=wanted_eviction(request.budget, request.policy, request.layers),
        packs=None if request.packs is None else str(request.packs),
        sessions=None if request.sessions is None else str(request.sessions),
        sessions_bytes=request.sessions_bytes,
        shares=request.settings.shares,
    )
    run(options, request.model.name.removesuffix(".gguf"), request.settings, ready, tell)


@dataclass(frozen=True)
class WorkerRequest(Request):
    """A worker to run.

    Attributes:
        host: the address to listen on. Whoever reaches it may use it: llama.cpp's RPC engine asks for no key.
        threads: by default the big physical cores.
    """

    host: str = "127.0.0.1"
    port: int = 50052
    threads: int | None = None


def serve_layers(request: WorkerRequest) -> None:
    """Run until the process ends.

    Raises:
        InputError: an option is out of its range.
        BackendError: llama.cpp is not installed or has no RPC engine, or cannot listen there.
    """
    from edgekv.backends.llama_cpp.rpc import run_worker

    require_positive(threads=request.threads)
    if not 0 < request.port < 65536:
        raise InputError(f"port is {request.port}; it must be between 1 and 65535")
    run_worker(request.host, request.port, request.threads or default_threads())
