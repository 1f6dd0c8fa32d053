"""The llama_cpp module, imported here alone: low-level functions, its log, choices that depend on the CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
import types
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.errors import BackendError, InputError
from edgekv.host.isa import cpu_flags, require_runnable
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.quant.cache_format import CacheFormat
from edgekv.source import Array

_GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: cards, and those of the chip
_LOG_DEBUG, _LOG_ERROR, _LOG_CONTINUED = 1, 4, 5  # enum ggml_log_level


class EngineLog:
    """The last lines of llama.cpp's log, kept with their levels instead of printed; one log per process."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=400)
        self._level = 0

    def write(self, level: int, text: bytes) -> None:
        """Keep a message; debug messages are dropped, as every graph that is built writes hundreds."""
        if level != _LOG_CONTINUED:
            self._level = level
        if self._level != _LOG_DEBUG:
            self._lines.append((self._level, text.decode("utf-8", "replace").rstrip("\n")))

    def clear(self) -> None:
        """Drop all lines."""
        self._lines.clear()

    def text(self) -> str:
        """All lines kept."""
        return "\n".join(line for _, line in self._lines)

    def cause(self) -> str:
        """The last three error lines, or else the last two lines, joined to one."""
        errors = [line for level, line in self._lines if level == _LOG_ERROR]
        lines = errors[-3:] or [line for _, line in self._lines if line.strip(". ")][-2:]
        return "; ".join(line.strip() for line in lines) or "it gave no reason"

    def cache_nbytes(self) -> int:
        """Sum of the "KV buffer size" lines, each rounded to 0.01 MiB; 0 without such lines."""
        sizes = re.findall(r"KV buffer size =\s*([\d.]+) MiB", self.text())
        return round(sum(map(float, sizes)) * 2**20)

    def cache_encodings(self) -> tuple[str, str]:
        """edgekv.cache.rows.Plane.encoding of keys and of values, as the "attn_rot" lines have it."""
        return tuple("hadamard" if f"attn_rot_{kind} = 1," in self.text() else "" for kind in "kv")  # type: ignore[return-value]


LOG = EngineLog()


@functools.cache
def llama() -> Any:
    """The module llama_cpp.llama_cpp, initialized, with its log in LOG.

    Raises:
        BackendError: llama-cpp-python is not installed, or was built for another CPU.
    """
    require_runnable()
    try:
        module = _low_level()
    except ImportError as error:
        raise BackendError(
            "the llama.cpp engine is not installed; pip install 'edgekv[llama]' (compiling takes minutes, and "
            f"needs cmake and a C++ compiler) [{error}]"
        ) from error
    module.llama_log_set(_log_callback(module), None)
    module.llama_backend_init()
    return module


@functools.cache
def _log_callback(module: Any) -> Any:
    return module.llama_log_callback(lambda level, text, _: LOG.write(level, text))


def take_log() -> None:
    """Have llama.cpp write to LOG again: the package llama_cpp takes its log when somebody imports it later."""
    api = llama()
    api.llama_log_set(_log_callback(api), None)


def _low_level() -> Any:
    """llama_cpp.llama_cpp without its package's __init__, which imports the high-level API, jinja2,
    diskcache and sqlite3: 9 MB. A later `import llama_cpp` still gives the whole package."""
    name = "llama_cpp"
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None:
        return importlib.import_module(f"{name}.{name}")
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    try:
        return importlib.import_module(f"{name}.{name}")
    finally:
        del sys.modules[name]


@functools.cache
def repacking_is_safe(root: Path = Path("/")) -> bool:
    """Whether llama.cpp may repack weights for this CPU: yes, except on x86 with AMX.

    Compiled by GCC 12, its AMX kernels load a tile configuration that the compiler optimized away, and the
    process dies in ggml_backend_amx_mul_mat on the first prompt (ggml-org/llama.cpp issue 20824, pull
    request 26954). AVX-512 then runs the plain weights. `root` holds proc.
    """
    return "amx_tile" not in cpu_flags(root)


def has_gpu() -> bool:
    """Whether llama.cpp would put layers elsewhere than into the CPU's memory: on a card, or on workers.

    llama_supports_gpu_offload says so of every build with the RPC engine too, whether it has workers or not.
    """
    api = llama()
    if not api.llama_supports_rpc():
        return bool(api.llama_supports_gpu_offload())
    by_type = api._lib.ggml_backend_dev_by_type
    by_type.restype, by_type.argtypes = ctypes.c_void_p, [ctypes.c_int]
    return any(by_type(kind) for kind in _GPU_TYPES)


def load_model(
    path: Path, repack: bool, mapped: bool, gpu: bool = True, layers_away: int | None = None
) -> Any:
    """A llama_model, to be freed with llama_model_free; BackendError if llama.cpp refuses the file.

    Args:
        layers_away: layers that lie elsewhere than in the CPU's memory; by default all that llama.cpp can put there.
    """
    api = llama()
    params = api.llama_model_default_params()
    params.use_extra_bufts = repack
    if not mapped:
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
    if not gpu:
        params.n_gpu_layers = 0
    elif layers_away is not None:
        params.n_gpu_layers = layers_away
    take_log()
    LOG.clear()
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise BackendError(f"llama.cpp could not load {path}: {LOG.cause()}")
    return model


def possible_ubatch(header: GGUFHeader, wanted: int) -> int:
    """Tokens that llama.cpp can compute at once, at most those wanted.

    src/models/plm.cpp passes V with two dims: more than one token abort the process.
    """
    return 1 if header.metadata.get("general.architecture") == "plm" else wanted


def require_one_row(header: GGUFHeader, cache: CacheFormat, path: Path) -> None:
    """Raise InputError if K and V differ in a cache that llama.cpp keeps as a latent (llama_hparams::is_mla)."""
    if f"{header.metadata.get('general.architecture')}.attention.key_length_mla" in header.metadata:
        try:
            cache.require_one_row()
        except ValueError as error:
            raise InputError(f"{path}: cache type {cache}: {error}") from error


def logits_rows(context: Any, row: int, count: int, n_vocab: int) -> Array:
    """Logits (count, n_vocab) from output `row` on, as a view; waits until they are computed."""
    pointer = llama().llama_get_logits_ith(context, row)
    if not pointer:
        raise BackendError(f"llama.cpp gave no logits: {LOG.cause()}")
    floats = (ctypes.c_float * (count * n_vocab)).from_address(ctypes.addressof(pointer.contents))
    return np.frombuffer(memoryview(floats), np.float32).reshape(count, n_vocab)


def abort_callback() -> Any:
    """A native abort callback whose data is a C string: true while the string is not empty.

    llama.cpp calls it before every node of the graph, about a thousand times per token, so a Python function
    would hold the GIL for a millisecond per token. libc's strlen fits: it takes a pointer, and the low byte
    of its result, 0 or 1 here, is the bool.
    """
    return ctypes.cast(ctypes.CDLL(None).strlen, llama().ggml_abort_callback)


def exact_cache_nbytes(memory: int) -> int | None:
    """Bytes that llama.cpp allocated for keys and values; None for other kinds of memory or hidden symbols.

    The public API has no sizes, so this calls exported const C++ methods: llama_kv_cache::total_size()
    (src/llama-kv-cache.h), of a model with windows for both caches of its llama_kv_cache_iswa, whose class its
    vtable tells.
    """
    try:
        if is_a("llama_kv_cache", memory):
            caches = [memory]
        elif is_a("llama_kv_cache_iswa", memory):
            getters = ("_ZNK19llama_kv_cache_iswa8get_baseEv", "_ZNK19llama_kv_cache_iswa7get_swaEv")
            caches = [_call(getter, ctypes.c_void_p, memory) for getter in getters]
        else:
            return None
        return sum(_call("_ZNK14llama_kv_cache10total_sizeEv", ctypes.c_size_t, cache) for cache in caches)
    except (AttributeError, ValueError):
        return None


def is_a(name: str, pointer: int) -> bool:
    """Whether a C++ object of llama.cpp is of this very class."""
    vtable = ctypes.addressof(ctypes.c_char.in_dll(llama()._lib, f"_ZTV{len(name)}{name}"))
    # Itanium C++ ABI: an object points 16 bytes into its class's vtable.
    return ctypes.c_void_p.from_address(pointer).value == vtable + 2 * ctypes.sizeof(ctypes.c_void_p)


def _call(symbol: str, result: Any, pointer: int) -> int:
    """What an exported C++ method without arguments returns."""
    method = llama()._lib[symbol]
    method.argtypes, method.restype = [ctypes.c_void_p], result
    return int(method(pointer))
