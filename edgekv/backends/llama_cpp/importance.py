"""The importance matrix (imatrix) of a model, measured in llama.cpp: E[x_i^2] of every weight's inputs.

The error of a quantized row w on an input x is (dw . x)^2. Its mean over uncorrelated inputs is the sum of
dw_i^2 * E[x_i^2], so quantization should weigh errors by E[x_i^2] (ggml-org/llama.cpp pull request 4861;
tools/imatrix there). A callback sees every node of llama.cpp's graph, so that all its architectures are
covered, experts and per-head matrices too.

Runs in a child process: edgekv.backends.isolated.quantizer_child.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.llama_cpp.library import (
    LOG,
    llama,
    load_model,
    logits_rows,
    possible_ubatch,
    repacking_is_safe,
)
from edgekv.errors import BackendError
from edgekv.models.gguf.header import kept_header
from edgekv.progress import Progress
from edgekv.reference.sample import write_on
from edgekv.source import Array

LOGITS_EVERY = 8  # tokens: the output matrix runs only where logits are asked for
FLOOR = 1e-6  # of the mean importance: channels that were always zero must not be quantized at random
F32, I32 = 0, 26  # enum ggml_type
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml/include/ggml.h, as llama-cpp-python 0.3.36 carries it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Importance:
    """Sums of squared inputs by weight name; `watch` is a ggml_backend_sched_eval_callback.

    `error` holds an exception of the callback, which cannot be raised through native code.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}  # name: (matrices, columns)
        self._counts: dict[str, NDArray[np.int64]] = {}  # name: (matrices,)
        self._library = llama()._lib
        self._library.ggml_op_name.restype = ctypes.c_char_p
        ops = {self._library.ggml_op_name(i): i for i in range(64)}
        self._plain, self._routed = ops[b"MUL_MAT"], ops[b"MUL_MAT_ID"]
        self._checked = False
        self.error: Exception | None = None

    def watch(self, address: int, ask: bool, _: object) -> bool:
        """Called twice per graph node: whether its data are wanted (`ask`), then once they are computed."""
        try:
            node = Tensor.from_address(address)
            if not self._checked:
                require_known_layout(address)
                self._checked = True
            if node.op not in (self._plain, self._routed):
                return not ask
            name = node.src[0].contents.name.decode()
            if not name.endswith(".weight") or node.src[1].contents.type != F32:
                return not ask
            if not ask:
                self._add(name, node)
            return True
        except Exception as error:
            self.error = error
            return False

    def finish(self) -> dict[str, Array]:
        """E[x^2] by weight name, (matrices * columns,) each, as llama_model_quantize takes it.

        An expert that no token was routed to gets the mean of the others.
        """
        found = {}
        for name, sums in self._sums.items():
            seen = self._counts[name] > 0
            mean = sums / np.maximum(self._counts[name], 1)[:, None]
            mean[~seen] = mean[seen].mean(axis=0)
            found[name] = np.asarray(np.maximum(mean, FLOOR * mean.mean()), np.float32).reshape(-1)
        return {name: values for name, values in found.items() if values.any() and np.isfinite(values).all()}

    def _add(self, name: str, node: Tensor) -> None:
        weight, inputs = node.src[0].contents, tensor_view(node.src[1].contents, np.float32)
        n_matrices, columns = int(weight.ne[2]), int(weight.ne[0])
        sums = self._sums.setdefault(name, np.zeros((n_matrices, columns)))
        counts = self._counts.setdefault(name, np.zeros(n_matrices, np.int64))
        if node.op == self._routed:
            self._add_routed(sums, counts, inputs, tensor_view(node.src[2].contents, np.int32))
            return
        squares = np.square(inputs[0]).sum(axis=1, dtype=np.float64)  # (inputs' matrices, columns)
        repeat = squares.shape[0] // n_matrices  # query heads that share one matrix
        sums += squares.reshape(n_matrices, repeat, columns).sum(axis=1)
        counts += inputs.shape[2] * repeat

    @staticmethod
    def _add_routed(
        sums: NDArray[np.float64], counts: NDArray[np.int64], inputs: Array, ids: NDArray[np.int32]
    ) -> None:
        """inputs (1, T, 1 or used experts, columns), ids (1, 1, T, used experts)."""
        chosen = ids[0, 0]
        squares = np.broadcast_to(np.square(inputs[0]), (*chosen.shape, inputs.shape[-1]))
        for expert in np.unique(chosen):
            rows = squares[chosen == expert]
            sums[expert] += rows.sum(axis=0, dtype=np.float64)
            counts[expert] += len(rows)


def require_known_layout(address: int) -> None:
    """Raise BackendError unless the tensor there is laid out as `Tensor` is."""
    library = llama()._lib
    library.ggml_get_name.restype = ctypes.c_void_p
    if library.ggml_get_name(ctypes.c_void_p(address)) != address + Tensor.name.offset:
        raise BackendError(
            "this llama.cpp has another struct ggml_tensor; pip install llama-cpp-python==0.3.36"
        )


def tensor_view(tensor: Tensor, dtype: Any) -> Any:
    """A view of the tensor's data in NumPy's order (ne3, ne2, ne1, ne0), by its own strides."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    nbytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 4
    flat = np.frombuffer((ctypes.c_char * nbytes).from_address(tensor.data), np.uint8)
    return np.ndarray(shape, dtype, buffer=flat.data, strides=strides)


def measure_importance(
    path: Path, windows: NDArray[np.int64], n_threads: int, progress: Progress
) -> dict[str, Array]:
    """E[x^2] of every weight's input, by weight name, over token windows (n, T).

    Raises:
        BackendError: the engine is not installed, refused the model or failed.
    """
    api, importance = llama(), Importance()
    n_windows, length = windows.shape
    with _context(path, length, 1, n_threads, importance) as context:
        for i, window in enumerate(windows):
            api.llama_memory_clear(api.llama_get_memory(context), True)
            wanted = np.arange(length) % LOGITS_EVERY == LOGITS_EVERY - 1
            wanted[-1] = True
            _decode(context, window, np.arange(length), np.zeros(length, int), wanted)
            if importance.error is not None:
                raise importance.error
            progress(i + 1, n_windows)
    return importance.finish()


def sample_text(
    path: Path, prompts: NDArray[np.int64], length: int, seed: int, n_threads: int, progress: Progress
) -> NDArray[np.int64]:
    """Windows (n, length) that continue prompts (n, P) by sampling at temperature 1, all in one batch.

    As edgekv.text.self_written (LLM-QAT, arXiv 2305.17888, section 2.1), for whatever llama.cpp runs.
    """
    api, (n, _) = llama(), prompts.shape
    assert n <= MAX_SEQUENCES, n
    sequences, every = np.arange(n), np.ones(n, bool)
    with _context(path, length * n, n, n_threads, None) as context:
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))

        def step(tokens: NDArray[np.int64], position: int) -> Array:
            _decode(context, tokens, np.full(n, position), sequences, every)
            return logits_rows(context, 0, n, n_vocab)

        return write_on(step, prompts, length, np.random.default_rng(seed), progress)


@contextmanager
def _context(
    path: Path, n_ctx: int, n_sequences: int, n_threads: int, importance: Importance | None
) -> Iterator[Any]:
    """A context on the CPU, freed with its model at the end."""
    api, header = llama(), kept_header(path)
    with ExitStack() as stack:
        model = load_model(path, repacking_is_safe(), header.mappable, gpu=False)
        stack.callback(api.llama_model_free, model)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, n_sequences
        params.n_ubatch = possible_ubatch(header, min(n_ctx, 512))
        params.n_batch = min(n_ctx, 2048)
        params.n_threads = params.n_threads_batch = n_threads
        params.offload_kqv = params.op_offload = False
        if importance is not None:
            params.cb_eval = callback = api.ggml_backend_sched_eval_callback(importance.watch)  # noqa: F841
        context = api.llama_init_from_model(model, params)
        if not context:
            raise BackendError(f"llama.cpp loaded {path} but could not open a context: {LOG.cause()}")
        stack.callback(api.llama_free, context)
        yield context


def _decode(
    context: Any,
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    sequences: NDArray[np.int64],
    wanted: NDArray[np.bool_],
) -> None:
    """One llama_decode; logits where `wanted`."""
    api, n = llama(), len(tokens)
    batch = api.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = int(tokens[i])
            batch.pos[i] = int(positions[i])
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(sequences[i])
            batch.logits[i] = int(wanted[i])
        status = api.llama_decode(context, batch)
    finally:
        api.llama_batch_free(batch)
    if status not in (0, 2):  # 2: the callback stopped it and holds the error
        raise BackendError(f"llama.cpp failed with status {status}: {LOG.cause()}")
