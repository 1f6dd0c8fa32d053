"""A model that llama.cpp has loaded, and a context on it: what every use of one shares."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import DEFAULT_N_CTX, require_cache_format, require_positive
from edgekv.backends.kernel_names import Kernel
from edgekv.backends.llama_cpp.fits import require_memory
from edgekv.backends.llama_cpp.footprint import default_ubatch
from edgekv.backends.llama_cpp.kernel.load import use_kernel
from edgekv.backends.llama_cpp.language import LlamaLanguage
from edgekv.backends.llama_cpp.library import (
    LOG,
    abort_callback,
    exact_cache_nbytes,
    has_gpu,
    llama,
    load_model,
    possible_ubatch,
    repacking_is_safe,
    require_one_row,
)
from edgekv.backends.llama_cpp.rpc import layers_on_workers
from edgekv.backends.llama_cpp.state import StateFormat, read_state, write_state
from edgekv.backends.llama_cpp.watch import QueryWatch
from edgekv.cache.rows import Bytes, CacheRows
from edgekv.errors import BackendError, InputError
from edgekv.host.memory import machine_nbytes
from edgekv.host.threads import default_threads
from edgekv.models.gguf.parts import read_parts

_CACHE_TYPE_REFUSALS = ("does not divide n_embd_head", "does not support different K")  # llama-context.cpp


class LlamaContext:
    """A model and its context, with flash attention.

    Weights are repacked for the CPU's dot products only if a second copy of them fits in memory: without it,
    prefill is slower.

    On a GPU llama.cpp decides on flash attention: where the card has no kernel for a latent's widths, forcing
    it would send every layer's attention back to the CPU.

    Args:
        path: a GGUF file; it is validated before native code reads it.
        n_ctx: cells of the cache for each sequence, rounded up by llama.cpp to a multiple of 256 in all; by default
            the trained length, but at most 4096; llama.cpp itself would take the whole trained length.
        cache_type: number format of K and V, or of each as in q8_0/q4_0; edgekv.quant.formats.CACHE_TYPES.
        n_threads: by default one per physical big core.
        n_sequences: how many may be decoded side by side; they share all cells.
        n_outputs: most rows of logits of one micro-batch.
        keeps_all: layers with a window keep the whole context and not little more than the window, so that rows of any
            position can be cut off or shared.
        abort_flag: two bytes, which may lie in shared memory; a call in progress ends when the first is set.
        watch: is shown the queries; each token takes some milliseconds more.

    Raises:
        ModelFileError: the file is malformed.
        InputError: an option is impossible.
        BackendError: the engine is not installed, or refused the model.
    """

    name = "llama.cpp"
    kernel: Kernel

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None,
        cache_type: str,
        n_threads: int | None,
        n_sequences: int,
        n_outputs: int,
        keeps_all: bool,
        abort_flag: ctypes.Array[ctypes.c_char] | None = None,
        watch: QueryWatch | None = None,
    ) -> None:
        require_positive(n_ctx=n_ctx, n_threads=n_threads)
        cache = require_cache_format(cache_type)
        header = read_parts(path)
        require_one_row(header, cache, path)
        self.n_ctx_train = header.trained_context
        n_ctx = n_ctx or min(self.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
        n_cells = n_ctx * n_sequences
        n_ubatch = possible_ubatch(header, min(default_ubatch(machine_nbytes()), n_cells))
        self._api = llama()
        layers_away = layers_on_workers(header.n_layers)
        repack = repacking_is_safe()
        if not has_gpu():
            spare = require_memory(
                path, header, n_cells, cache_type, n_ubatch, n_sequences=n_sequences, keeps_all=keeps_all
            )
            repack &= spare is None or spare >= sum(tensor.nbytes for tensor in header.tensors)
        elif cache.cpu_only:
            raise InputError(
                f"{path}: llama.cpp keeps a cache in {cache.cpu_only} on a CPU only, and this build of it runs on a "
                "GPU; take q8_0 or q4_0"
            )
        mapped = header.mappable
        del header
        self._watch = watch
        self._abort = abort_flag if abort_flag is not None else ctypes.create_string_buffer(2)
        self._context: Any = None
        self._model = load_model(path, repack, mapped, layers_away=layers_away)
        # What is in a CPU's formats alone the kernel leaves to llama.cpp.
        self.kernel = "stock" if cache.cpu_only else use_kernel()
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_cells, n_sequences, True
        params.n_ubatch, params.n_batch = n_ubatch, max(n_ubatch, n_sequences)
        params.n_outputs_max = min(n_outputs, params.n_batch)  # 0 would reserve n_batch x vocab floats
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.type_k, params.type_v = cache.k.ggml_id, cache.v.ggml_id
        params.swa_full = keeps_all
        if watch is not None:
            self._callback = self._api.ggml_backend_sched_eval_callback(
                watch.watch
            )  # native code alone has it
            params.cb_eval = self._callback
        self._context = self._open(path, params)
        self._memory = self._api.llama_get_memory(self._context)
        self._window = int(self._api.llama_model_n_swa(self._model))
        self._encodings = LOG.cache_encodings()
        self._cache_nbytes = exact_cache_nbytes(self._memory) or LOG.cache_nbytes()
        self.n_ctx = int(self._api.llama_n_ctx(self._context))
        self.n_ubatch = int(self._api.llama_n_ubatch(self._context))
        self.n_threads = int(self._api.llama_n_threads(self._context))
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))

    def cache_nbytes(self) -> int:
        """Bytes that llama.cpp allocated for all cells."""
        return self._cache_nbytes

    def language(self) -> LlamaLanguage:
        """The model's vocabulary in llama.cpp; unusable once this is closed."""
        return LlamaLanguage(self._api, self._model)

    def close(self) -> None:
        """Free the model."""
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None

    def _read_rows(self, sequence: int, start: int = 0) -> tuple[StateFormat, CacheRows]:
        """How this context writes its states, and a sequence's rows from position `start` on; it holds one at least.

        Raises:
            UnsupportedError: llama.cpp keeps more of this model than one plain cache.
            BackendError: it could not write them.
        """
        return read_state(self._state(sequence), self._encodings, start)

    def _state(self, sequence: int) -> Bytes:
        state = np.empty(self._api.llama_state_seq_get_size(self._context, sequence), np.uint8)
        pointer = _pointer(state)
        if self._api.llama_state_seq_get_data(self._context, pointer, len(state), sequence) != len(state):
            raise BackendError(f"llama.cpp could not save its cache: {LOG.cause()}")
        return state

    def _write_rows(self, form: StateFormat, sequence: int, rows: CacheRows) -> None:
        """Put rows into an empty sequence; raises BackendError if llama.cpp refuses them."""
        state = write_state(form, rows)
        pointer = _pointer(state)
        if self._api.llama_state_seq_set_data(self._context, pointer, len(state), sequence) != len(state):
            raise BackendError(f"llama.cpp refused {rows.n_tokens} cached rows: {LOG.cause()}")

    def _open(self, path: Path, params: Any) -> Any:
        choices = (self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED, self._api.LLAMA_FLASH_ATTN_TYPE_AUTO)
        params.flash_attn_type = choices[has_gpu()]
        params.abort_callback = abort_callback()
        params.abort_callback_data = ctypes.addressof(self._abort)
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            cause = LOG.cause()
            if any(words in cause for words in _CACHE_TYPE_REFUSALS):
                raise InputError(f"{path} cannot have this cache type: {cause}; f16 always works")
            raise BackendError(
                f"llama.cpp loaded {path} but could not open a context of {params.n_ctx} tokens: {cause}"
            )
        return context


def _pointer(array: Bytes) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
