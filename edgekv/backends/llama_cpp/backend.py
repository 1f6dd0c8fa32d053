"""llama.cpp behind the Backend protocol, on its low-level functions.

The high-level `llama_cpp.Llama` keeps a float32 score for every token of a batch (262 MB at 512 x 128256)
and turns flash attention off; nothing of it is used here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import DEFAULT_N_CTX, Interrupted, require_positive, require_room
from edgekv.backends.llama_cpp import footprint
from edgekv.backends.llama_cpp.fits import require_memory
from edgekv.backends.llama_cpp.language import LlamaLanguage
from edgekv.backends.llama_cpp.library import (
    LOG,
    abort_callback,
    exact_cache_nbytes,
    ggml_type,
    llama,
    repacking_is_safe,
)
from edgekv.errors import BackendError, InputError
from edgekv.host.memory import machine_nbytes
from edgekv.host.threads import default_threads
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.source import Array

# Rows of logits computed at once when every token's are wanted: 64 rows cost 10 % of the speed of 256,
# more only cost memory (two float32 buffers of rows x vocab).
LOGITS_ROWS = 128
_CACHE_TYPE_REFUSALS = ("does not divide n_embd_head", "does not support different K")  # llama-context.cpp


class LlamaCppBackend:
    """edgekv.backends.base.Backend over llama.cpp; flash attention on, nothing ever shifted.

    Where a second copy of the weights would not fit beside what is needed, they are not repacked for the CPU's dot
    products: prefill is slower then.

    On a GPU the engine decides on flash attention itself: where the card has no kernel for a latent's widths,
    forcing it would send every layer's attention back to the CPU.

    Args:
        path: a GGUF file; it is validated before native code sees it.
        n_ctx: cells of the cache, rounded up by the engine to a multiple of 256; by default what the model
            was trained for, but at most 4096.
        cache_type: how K and V are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
        cache_type_v: another type for V; a model with MLA has no V of its own, so it must be the same there.
        n_threads: by default the physical big cores.
        abort_flag: two bytes; a call in progress ends with Interrupted when the first is set. For a flag in
            shared memory.

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
        cache_type_v: str | None = None,
        n_threads: int | None = None,
        abort_flag: ctypes.Array[ctypes.c_char] | None = None,
    ) -> None:
        require_positive(n_ctx=n_ctx, n_threads=n_threads)
        types = ggml_type(cache_type), ggml_type(cache_type_v or cache_type)
        header = read_header(path)
        # src/models/plm.cpp hands V over in two dims: more tokens abort the process.
        n_ubatch = 1 if header.metadata.get("general.architecture") == "plm" else default_ubatch()
        self._api = llama()
        repack = repacking_is_safe()
        if not self._api.llama_supports_gpu_offload():
            wanted = n_ctx or _default_n_ctx(header)
            spare = require_memory(path, header, wanted, cache_type, min(n_ubatch, wanted))
            repack &= spare is None or spare >= sum(tensor.nbytes for tensor in header.tensors)
        del header
        self._abort = abort_flag if abort_flag is not None else ctypes.create_string_buffer(2)
        self._context: Any = None
        self._model = self._load(path, repack)
        self._context = self._open_context(path, n_ctx, types, n_threads, n_ubatch)
        self._memory = self._api.llama_get_memory(self._context)
        self._cache_nbytes = exact_cache_nbytes(self._memory) or LOG.cache_nbytes()
        self.n_ctx = int(self._api.llama_n_ctx(self._context))
        self.n_ubatch = int(self._api.llama_n_ubatch(self._context))
        self.n_threads = int(self._api.llama_n_threads(self._context))
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))
        self._n_past = 0
        self._token = (ctypes.c_int32 * 1)()
        self._one_token = self._api.llama_batch(n_tokens=1, token=self._token)

    @property
    def n_past(self) -> int:
        return self._n_past

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens in pieces of n_ubatch; logits of the last one, shape (vocab,).

        Raises:
            BackendError: the cache has no room for them, or the engine failed.
            Interrupted: the abort flag was set meanwhile; `n_past` tells how far it came.
        """
        require_room(self, len(tokens))
        for start in range(0, len(tokens), self.n_ubatch):
            self._run(self._batch(tokens[start : start + self.n_ubatch], every=False))
        return self._last_logits()

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of every one, shape (T, vocab)."""
        require_room(self, len(tokens))
        logits = np.empty((len(tokens), self.n_vocab), np.float32)
        rows = min(LOGITS_ROWS, self.n_ubatch)
        for start in range(0, len(tokens), rows):
            piece = tokens[start : start + rows]
            self._run(self._batch(piece, every=True))
            logits[start : start + len(piece)] = self._logits(0, len(piece))
        return logits

    def decode(self, token: int) -> Array:
        """Append one token; its logits, shape (vocab,)."""
        require_room(self, 1)
        self._token[0] = int(token)
        self._run(self._one_token)
        return self._last_logits()

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self._n_past, (n_past, self._n_past)
        if n_past == self._n_past:
            return
        if not self._api.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            raise BackendError(f"llama.cpp cannot take this model's cache back to {n_past} tokens")
        self._n_past = n_past

    def cache_nbytes(self) -> int:
        return self._cache_nbytes

    def language(self) -> LlamaLanguage:
        """The model's vocabulary, as the engine holds it; closed with this."""
        return LlamaLanguage(self._api, self._model)

    def close(self) -> None:
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None

    def _load(self, path: Path, repack: bool) -> Any:
        params = self._api.llama_model_default_params()
        params.use_extra_bufts = repack
        LOG.clear()
        model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise BackendError(f"llama.cpp could not load {path}: {LOG.cause()}")
        return model

    def _open_context(
        self,
        path: Path,
        n_ctx: int | None,
        types: tuple[int, int],
        n_threads: int | None,
        n_ubatch: int,
    ) -> Any:
        params = self._api.llama_context_default_params()
        trained = int(self._api.llama_model_n_ctx_train(self._model))
        params.n_ctx = n_ctx or min(trained or DEFAULT_N_CTX, DEFAULT_N_CTX)
        params.n_ubatch = params.n_batch = min(n_ubatch, params.n_ctx)
        params.n_outputs_max = min(LOGITS_ROWS, params.n_ubatch)  # 0 would reserve n_batch x vocab floats
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.type_k, params.type_v = types
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
            raise BackendError(f"llama.cpp loaded {path} but not a context of {params.n_ctx} tokens: {cause}")
        return context

    def _batch(self, tokens: Sequence[int], every: bool) -> Any:
        """A llama_batch of sequence 0 that continues the cache; logits of every token or of the last."""
        count = len(tokens)
        ids = (ctypes.c_int32 * count).from_buffer_copy(np.asarray(tokens, np.int32).tobytes())
        batch = self._api.llama_batch(n_tokens=count, token=ids)
        if every:
            batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        return batch

    def _run(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status == 0:
            self._n_past += batch.n_tokens
            return
        self._n_past = self._api.llama_memory_seq_pos_max(self._memory, 0) + 1
        if status == 2:  # the abort callback
            self._abort[0] = b"\0"
            raise Interrupted
        raise BackendError(
            f"llama.cpp failed with status {status} at token {self._n_past} of {self.n_ctx}: {LOG.cause()}"
        )

    def _last_logits(self) -> Array:
        return self._logits(-1, 1).reshape(-1).copy()

    def _logits(self, row: int, count: int) -> Array:
        """A view of `count` rows of logits from output `row` on; waits until they are computed."""
        pointer = self._api.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise BackendError(f"llama.cpp gave no logits: {LOG.cause()}")
        floats = (ctypes.c_float * (count * self.n_vocab)).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(floats), np.float32).reshape(count, self.n_vocab)


def default_ubatch() -> int:
    """Tokens processed at once in prefill: large batches are faster, and cost memory for activations."""
    return footprint.default_ubatch(machine_nbytes())


def _default_n_ctx(header: GGUFHeader) -> int:
    trained = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    return min(trained, DEFAULT_N_CTX) if isinstance(trained, int) and trained > 0 else DEFAULT_N_CTX
