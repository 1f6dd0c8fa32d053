"""Layers of a model on other machines, by llama.cpp's own RPC engine.

It knows no keys and no encryption, and a worker does what a connection asks of it: for trusted networks alone. Which
workers a model is opened over lies in the environment, as its engine runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from ctypes import c_bool, c_char_p, c_size_t, c_uint32, c_void_p
from typing import Any

from edgekv.backends.kernel_names import RPC_VARIABLE
from edgekv.backends.llama_cpp.library import llama
from edgekv.errors import BackendError, InputError
from edgekv.host.memory import available_nbytes

_ENDPOINT = re.compile(r"[\w.-]+:\d{1,5}")
_CPU = 0  # enum ggml_backend_dev_type
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # ggml/include/{ggml-rpc,ggml-backend}.h, protocol 7
    "ggml_backend_rpc_add_server": (c_void_p, [c_char_p]),
    "ggml_backend_rpc_get_device_memory": (
        None,
        [c_char_p, c_uint32, ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)],
    ),
    "ggml_backend_rpc_start_server": (
        None,
        [c_char_p, c_char_p, c_size_t, c_size_t, ctypes.POINTER(c_void_p)],
    ),
    "ggml_backend_register": (None, [c_void_p]),
    "ggml_backend_dev_by_type": (c_void_p, [ctypes.c_int]),
    "llama_supports_rpc": (c_bool, []),
}


def chosen_workers() -> list[str]:
    """The workers to use, each as host:port; none where nobody asked for them.

    Raises:
        InputError: one of them is no host:port.
    """
    words = [word.strip() for word in os.environ.get(RPC_VARIABLE, "").split(",") if word.strip()]
    for word in words:
        if not _ENDPOINT.fullmatch(word):
            raise InputError(f"{word!r} is no worker; name each as host:port, as in pi-2:50052,pi-3:50052")
    return words


def layers_on_workers(n_layers: int) -> int | None:
    """How many of a model's layers, and of its output as one more, the workers take: by their share of the free memory;
    None without workers.

    Registers them with ggml, which then puts the last layers there, in the order of the workers and by their memory.

    Raises:
        InputError: a worker's name is none.
        BackendError: this llama.cpp has no RPC engine, or a worker does not answer.
    """
    workers = chosen_workers()
    if not workers:
        return None
    require_rpc()
    away = sum(_free_nbytes(worker) for worker in workers)
    here = available_nbytes()
    _register(tuple(workers))
    return round((n_layers + 1) * away / (away + here)) if here is not None else n_layers + 1


def require_rpc() -> None:
    """Raise BackendError, and say how to build it, if llama.cpp has no RPC engine."""
    if not _function("llama_supports_rpc")():
        raise BackendError(
            "this llama-cpp-python is built without llama.cpp's RPC engine; build it anew with "
            "CMAKE_ARGS=-DGGML_RPC=on pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps "
            "llama-cpp-python==0.3.36, on every board"
        )


def run_worker(host: str, port: int, n_threads: int) -> None:
    """Keep and run layers for others, on this machine's CPU, until the process ends.

    Raises:
        BackendError: this llama.cpp has no RPC engine, or cannot listen there.
    """
    require_rpc()
    devices = (c_void_p * 1)(_function("ggml_backend_dev_by_type")(_CPU))
    _function("ggml_backend_rpc_start_server")(f"{host}:{port}".encode(), None, n_threads, 1, devices)
    raise BackendError(
        f"cannot listen on {host}, port {port}; choose another --port"
    )  # else it never returns


@functools.cache
def _register(workers: tuple[str, ...]) -> None:
    for worker in workers:
        if not (registry := _function("ggml_backend_rpc_add_server")(worker.encode())):
            raise BackendError(_lost(worker))
        _function("ggml_backend_register")(registry)


def _free_nbytes(worker: str) -> int:
    free, total = c_size_t(), c_size_t()
    _function("ggml_backend_rpc_get_device_memory")(
        worker.encode(), 0, ctypes.byref(free), ctypes.byref(total)
    )
    if not total.value:
        raise BackendError(_lost(worker))
    return free.value


def _lost(worker: str) -> str:
    return f"the worker {worker} does not answer; start `edgekv worker` there, of the same version"


def _function(name: str) -> Any:
    function = getattr(llama()._lib, name)
    function.restype, function.argtypes = _SIGNATURES[name]
    return function
