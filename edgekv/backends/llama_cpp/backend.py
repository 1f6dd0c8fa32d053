"""llama.cpp as a Backend, on the low-level functions of llama-cpp-python.

The high-level `llama_cpp.Llama` keeps float32 scores for every token of a batch (262 MB at 512 x 128256) and
turns flash attention off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import (
    DEFAULT_N_CTX,
    Backend,
    Interrupted,
    require_cache_format,
    require_loadable,
    require_positive,
    require_room,
)
from edgekv.backends.llama_cpp.fits import require_memory
from edgekv.backends.llama_cpp.footprint import default_ubatch
from edgekv.backends.llama_cpp.kernel.load import use_kernel
from edgekv.backends.llama_cpp.language import LlamaLanguage
from edgekv.backends.llama_cpp.library import (
    LOG,
    abort_callback,
    exact_cache_nbytes,
    llama,
    load_model,
    logits_rows,
    possible_ubatch,
    repacking_is_safe,
    require_one_row,
)
from edgekv.backends.llama_cpp.state import StateFormat, read_state, write_state
from edgekv.cache.rows import Bytes, CacheRows, Layout
from edgekv.errors import BackendError, InputError
from edgekv.host.memory import machine_nbytes
from edgekv.host.threads import default_threads
from edgekv.models.gguf.parts import read_parts
from edgekv.quant.cache_format import CacheFormat
from edgekv.source import Array

# Rows of logits computed at once when every token's are wanted: 64 rows are 10 % slower than 256, more rows
# only take memory (two float32 buffers of rows x vocab).
LOGITS_ROWS = 128
_CACHE_TYPE_REFUSALS = ("does not divide n_embd_head", "does not support different K")  # llama-context.cpp


class LlamaCppBackend(Backend):
    """llama.cpp as a Backend, with flash attention.

    Weights are repacked for the CPU's dot products only if a second copy of them fits in memory: without it,
    prefill is slower.

    On a GPU llama.cpp decides on flash attention: where the card has no kernel for a latent's widths, forcing
    it would send every layer's attention back to the CPU.

    Args:
        path: a GGUF file; it is validated before native code reads it.
        n_ctx: cells of the cache, rounded up by llama.cpp to a multiple of 256; by default the trained
            length, but at most 4096; llama.cpp itself would take the whole trained length.
        cache_type: number format of K and V, or of each as in q8_0/q4_0; edgekv.quant.formats.CACHE_TYPES.
        n_threads: by default one per physical big core.
        abort_flag: two bytes, which may lie in shared memory; a call in progress ends with Interrupted when
            the first is set.

    Raises:
        ModelFileError: the file is malformed.
        InputError: an option is impossible.
        BackendError: the engine is not installed, or refused the model.
    """

    name = "llama.cpp"

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        cache_type: str = "f16",
        n_threads: int | None = None,
        abort_flag: ctypes.Array[ctypes.c_char] | None = None,
    ) -> None:
        require_positive(n_ctx=n_ctx, n_threads=n_threads)
        cache = require_cache_format(cache_type)
        header = read_parts(path)
        require_one_row(header, cache, path)
        self.n_ctx_train = header.trained_context
        n_ctx = n_ctx or min(self.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
        n_ubatch = possible_ubatch(header, min(default_ubatch(machine_nbytes()), n_ctx))
        self._api = llama()
        repack = repacking_is_safe()
        if not self._api.llama_supports_gpu_offload():
            spare = require_memory(path, header, n_ctx, cache_type, n_ubatch)
            repack &= spare is None or spare >= sum(tensor.nbytes for tensor in header.tensors)
        elif cache.cpu_only:
            raise InputError(
                f"{path}: llama.cpp keeps a cache in {cache.cpu_only} on a CPU only, and this build of it runs on a "
                "GPU; take q8_0 or q4_0"
            )
        mapped = header.mappable
        del header
        self._abort = abort_flag if abort_flag is not None else ctypes.create_string_buffer(2)
        self._context: Any = None
        self._model = load_model(path, repack, mapped)
        # What is in a CPU's formats alone the kernel leaves to llama.cpp.
        self.kernel = "stock" if cache.cpu_only else use_kernel()
        self._context = self._open_context(path, n_ctx, cache, n_threads, n_ubatch)
        self._memory = self._api.llama_get_memory(self._context)
        self._window = int(self._api.llama_model_n_swa(self._model))
        self._cache_nbytes = exact_cache_nbytes(self._memory) or LOG.cache_nbytes()
        self._encodings = LOG.cache_encodings()
        self._format: StateFormat | None = None
        self.n_ctx = int(self._api.llama_n_ctx(self._context))
        self.n_ubatch = int(self._api.llama_n_ubatch(self._context))
        self.n_threads = int(self._api.llama_n_threads(self._context))
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))
        self.n_past = 0
        self._token = (ctypes.c_int32 * 1)()
        self._one_token = self._api.llama_batch(n_tokens=1, token=self._token)

    def prefill(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        for start in range(0, len(tokens), self.n_ubatch):
            self._run(self._batch(tokens[start : start + self.n_ubatch], every=False))
        return self._last_logits()

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        logits = np.empty((len(tokens), self.n_vocab), np.float32)
        rows = min(LOGITS_ROWS, self.n_ubatch)
        for start in range(0, len(tokens), rows):
            piece = tokens[start : start + rows]
            self._run(self._batch(piece, every=True))
            logits[start : start + len(piece)] = logits_rows(self._context, 0, len(piece), self.n_vocab)
        return logits

    def decode(self, token: int) -> Array:
        require_room(self, 1)
        self._token[0] = int(token)
        self._run(self._one_token)
        return self._last_logits()

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        if n_past == self.n_past:
            return
        api, memory = self._api, self._memory
        if not (self._remembers(n_past) and api.llama_memory_seq_rm(memory, 0, n_past, -1)):
            api.llama_memory_clear(memory, False)
            n_past = 0
        self.n_past = n_past

    def layout(self) -> Layout:
        return self._state_format().layout

    def save(self, start: int = 0) -> CacheRows:
        assert 0 <= start <= self.n_past, (start, self.n_past)
        if start == self.n_past:
            return CacheRows.empty(self.layout(), 0)
        return read_state(self._state(), self._encodings, start)[1]

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        self.trim(0)
        if not rows.n_tokens:
            return
        state = write_state(self._state_format(), rows)
        if self._api.llama_state_seq_set_data(self._context, _pointer(state), len(state), 0) != len(state):
            raise BackendError(f"llama.cpp refused {rows.n_tokens} cached rows: {LOG.cause()}")
        self.n_past = rows.n_tokens

    def cache_nbytes(self) -> int:
        return self._cache_nbytes

    def language(self) -> LlamaLanguage:
        """The model's vocabulary in llama.cpp; unusable once the backend is closed."""
        return LlamaLanguage(self._api, self._model)

    def close(self) -> None:
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None

    def _open_context(
        self, path: Path, n_ctx: int, cache: CacheFormat, n_threads: int | None, n_ubatch: int
    ) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_ubatch = params.n_batch = n_ubatch
        params.n_outputs_max = min(LOGITS_ROWS, n_ubatch)  # 0 would reserve n_batch x vocab floats
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.type_k, params.type_v = cache.k.ggml_id, cache.v.ggml_id
        params.swa_full = False  # layers with a window keep little more than it
        choices = (self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED, self._api.LLAMA_FLASH_ATTN_TYPE_AUTO)
        params.flash_attn_type = choices[self._api.llama_supports_gpu_offload()]
        params.abort_callback = abort_callback()
        params.abort_callback_data = ctypes.addressof(self._abort)
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            cause = LOG.cause()
            if any(words in cause for words in _CACHE_TYPE_REFUSALS):
                raise InputError(f"{path} cannot have this cache type: {cause}; f16 always works")
            raise BackendError(
                f"llama.cpp loaded {path} but could not open a context of {n_ctx} tokens: {cause}"
            )
        return context

    def _remembers(self, n_past: int) -> bool:
        """Whether the cache holds all that a token at position `n_past` sees.

        llama.cpp does not look: it would trim to fewer cells than the window, without a word, and number new
        tokens from the last cell that is left. Of layers with a window it keeps the cells from pos_min on.
        """
        seen = max(n_past - max(self._window - 1, 1), 0)  # the oldest position, and no less than one of them
        return n_past > 0 and int(self._api.llama_memory_seq_pos_min(self._memory, 0)) <= seen

    def _state_format(self) -> StateFormat:
        """How this context writes its states: read off the first one, of one token if the cache is empty."""
        if self._format is None:
            if self.n_past:
                state = self._state()
            else:
                self.decode(0)
                state = self._state()
                self.trim(0)
            self._format = read_state(state, self._encodings)[0]
        return self._format

    def _state(self) -> Bytes:
        """The state of the sequence as llama.cpp writes it."""
        state = np.empty(self._api.llama_state_seq_get_size(self._context, 0), np.uint8)
        if self._api.llama_state_seq_get_data(self._context, _pointer(state), len(state), 0) != len(state):
            raise BackendError(f"llama.cpp could not save its cache: {LOG.cause()}")
        return state

    def _batch(self, tokens: Sequence[int], every: bool) -> Any:
        """A llama_batch that continues sequence 0, with logits of every token or of the last."""
        count = len(tokens)
        ids = (ctypes.c_int32 * count).from_buffer_copy(np.asarray(tokens, np.int32).tobytes())
        batch = self._api.llama_batch(n_tokens=count, token=ids)
        if every:
            batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        return batch

    def _run(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status == 0:
            self.n_past += batch.n_tokens
            return
        self.n_past = self._api.llama_memory_seq_pos_max(self._memory, 0) + 1
        if status == 2:  # the abort callback
            self._abort[0] = b"\0"
            raise Interrupted
        raise BackendError(
            f"llama.cpp failed with status {status} at token {self.n_past} of {self.n_ctx}: {LOG.cause()}"
        )

    def _last_logits(self) -> Array:
        return logits_rows(self._context, -1, 1, self.n_vocab).reshape(-1).copy()


def _pointer(array: Bytes) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
