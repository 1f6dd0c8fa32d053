"""onnxruntime as a Backend, for folders that `edgekv export onnx` wrote. The only module that imports it.

The cache lives in NumPy arrays that are bound both as the graph's past and as its present: its nodes write new
rows in place, and no token costs a copy of the past.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.base import (
    DEFAULT_N_CTX,
    EvictableBackend,
    Interrupted,
    require_loadable,
    require_no_window,
    require_positive,
    require_room,
)
from edgekv.cache.policies.base import LayerView, Need, Rows, n_tail
from edgekv.cache.rows import CacheRows, Layout, Plane
from edgekv.errors import BackendError, InputError, UnsupportedError
from edgekv.host.memory import is_small_machine, release_file
from edgekv.host.threads import default_threads
from edgekv.models.onnx.folder import DATA, GRAPH
from edgekv.models.onnx.manifest import WINDOW_SLACK, LayerRecord, check_folder
from edgekv.source import Array

OLDEST = (1, 29)  # 1.26 has no Cos of float64 and gives other logits for quantized GQA
# The latent graph attends to every slot that is bound. Slots are bound in steps of this many, because binding
# all layers anew takes a millisecond.
SLOT_STEP = 128
MAX_PIECE = 64  # tokens prefilled at once: 128 are 10 % faster in an empty cache and take 8 MiB more
MAX_SCORES = 3 * 2**18  # attention scores per layer at once: they bound the memory of a prefill at depth
_ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
_PLANES = {np.dtype(np.float32): ("f32", ""), np.dtype(np.uint8): ("i8", "offset")}  # cache type, encoding
EVICTED = "n_evicted"  # an input of graphs from edgekv.export.onnx.decoder on
_PAST, _PRESENT = "past_key_values.", "present."


class OnnxBackend(EvictableBackend):
    """An exported graph on onnxruntime's CPU provider, as a Backend.

    Args:
        folder: a folder that `edgekv export onnx` wrote; it is checked before onnxruntime reads it.
        n_ctx: slots of the cache; by default the trained length, but at most 4096.
        cache_type: None, or the number format that the graph was exported with.
        n_threads: by default one per physical big core.
        abort_flag: two bytes; a prefill ends with Interrupted at its next piece when the first is set.

    Raises:
        ModelFileError: a file is missing, damaged or cut short, or a weight lies outside the folder.
        InputError: an option is impossible.
        BackendError: the engine is not installed, or refused the model.
    """

    name = "onnx"
    merges = False

    def __init__(
        self,
        folder: Path,
        *,
        n_ctx: int | None = None,
        cache_type: str | None = None,
        n_threads: int | None = None,
        abort_flag: ctypes.Array[ctypes.c_char] | None = None,
    ) -> None:
        require_positive(n_ctx=n_ctx, n_threads=n_threads)
        model = check_folder(folder).model
        if cache_type not in (None, model.cache_type):
            raise InputError(
                f"{folder} was exported with a cache in {model.cache_type}, not {cache_type}; leave out the cache "
                "type, or export it again"
            )
        self._caches = model.caches()
        kinds = {layer.kind for layer in self._caches}
        if n_ctx is not None and "GQA" in kinds and n_ctx > model.context_length:
            raise InputError(
                f"{folder} was exported for a context of {model.context_length} tokens, not {n_ctx}; "
                f"use --ctx-size {model.context_length} or less"
            )
        self.n_ctx_train = model.context_length
        self.max_positions = model.context_length if "GQA" in kinds else None
        self.n_ctx = n_ctx or min(model.context_length, DEFAULT_N_CTX)
        self.n_vocab = model.vocab
        self.n_threads = n_threads or default_threads()
        self._n_heads = model.n_heads
        self._has_latents = "MLA" in kinds
        self._abort = abort_flag if abort_flag is not None else ctypes.create_string_buffer(2)
        self._session = _open_session(folder / GRAPH, self.n_threads)
        self._data = folder / DATA
        # The engine packed its own copy of all weights, but keeps the file mapped for rows of the token table.
        # Linux reads 15 more pages around each of them: a long prompt would hold the table twice.
        release_file(self._data)
        self._binding = self._session.io_binding()
        self._cache = self._allocate()
        self._ones = np.ones((1, self.n_ctx), np.int64)
        self._n_bound = 0
        self.n_past = self._n_written = 0
        self._n_evicted = self._dense_from = 0
        self._n_evicted_input = np.zeros(1, np.int64)
        self._evicts = any(entry.name == EVICTED for entry in self._session.get_overridable_initializers())

    @property
    def n_rows(self) -> int:
        return self.n_past - self._n_evicted

    def prefill(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        for piece in self._pieces(tokens):
            if self._abort[0] != b"\0":
                self._abort[0] = b"\0"
                raise Interrupted
            logits = self._run(piece, 1)
            if len(piece) > 1:
                release_file(self._data)
        return logits.reshape(-1)

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        return np.concatenate([self._run(piece, len(piece)) for piece in self._pieces(tokens)])

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        if any(self._has_lost(layer, n_past) for layer in set(self._caches)):
            n_past = 0
        if n_past <= self._dense_from and n_past < self.n_past:
            n_past = self._n_evicted = self._dense_from = 0
        self.n_past = n_past
        if not n_past:
            self._n_written = 0

    def require_evictable(self, needs: Collection[Need]) -> None:
        require_no_window(layer.window for layer in self._caches)
        if not self._evicts:
            raise UnsupportedError(
                "this folder was exported by an EdgeKV that could not evict; export it again: edgekv export onnx"
            )
        if missing := sorted(set(needs) - {"keys"}):
            raise UnsupportedError(
                f"an exported graph shows keys and not {' and '.join(missing)}; take the policy streaming, knorm or "
                "keydiff"
            )

    def views(self) -> Iterator[LayerView]:
        for layer in range(len(self._caches)):
            keys = self._exact(f"{layer}.key")
            yield LayerView(len(keys), keys.shape[1], keys)

    def keep(self, rows: Sequence[Rows]) -> None:
        n_rows = rows[0].shape[-1]
        tail = min(n_tail(kept, self.n_rows) for kept in rows)
        self._dense_from = max(self._dense_from, self.n_past - tail)
        for name, array in self._cache.items():
            kept = rows[_layer(name)]
            array[0, :, :n_rows] = np.take_along_axis(array[0], kept[:, :, None], axis=1)
        self._n_evicted = self.n_past - n_rows

    def _exact(self, name: str) -> Array:
        """Cached rows (G, S, width) in float32."""
        stored = self._cache[name][0, :, : self.n_rows]
        if stored.dtype == np.float32:
            return stored
        return np.asarray(
            (stored.astype(np.float32) - 128) * self._cache[f"{name}_scale"][0, :, : self.n_rows]
        )

    def _has_lost(self, layer: LayerRecord, n_past: int) -> bool:
        """Whether a layer has let go of rows that a token behind `n_past` others looks at."""
        if not layer.window:
            return False
        if layer.kind == "MLA":  # a ring: what was written last is where the oldest rows were
            return self._n_written > layer.slots(self.n_ctx) and self._n_written - n_past > WINDOW_SLACK
        return _n_evicted(layer.window, n_past) != _n_evicted(layer.window, self.n_past)

    def layout(self) -> Layout:
        if any(layer.window for layer in self._caches):
            raise UnsupportedError(
                "layers with a sliding window keep a ring of rows, which sessions and packs do not hold; "
                "chat without them"
            )
        planes = []
        for name, array in self._stored():
            cache_type, encoding = _PLANES[array.dtype]
            planes.append(Plane(name, cache_type, array.shape[1] * array.shape[3], encoding))
        return tuple(planes)

    def save(self, start: int = 0) -> CacheRows:
        rows = CacheRows.empty(self.layout(), self.n_past - start)
        for target, (_, array) in zip(rows.planes(), self._stored(), strict=True):
            by_token = array[0, :, start : self.n_past].swapaxes(0, 1)
            target[:] = np.ascontiguousarray(by_token).view(np.uint8).reshape(target.shape)
        return rows

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        self.trim(0)
        for stored, (_, array) in zip(rows.planes(), self._stored(), strict=True):
            by_token = stored.view(array.dtype).reshape(rows.n_tokens, array.shape[1], array.shape[3])
            array[0, :, : rows.n_tokens] = by_token.swapaxes(0, 1)
        self.n_past = rows.n_tokens

    def cache_nbytes(self) -> int:
        return sum(layer.nbytes * layer.slots(self.n_ctx) for layer in self._caches)

    def close(self) -> None:
        self._binding = self._session = None
        self._cache = {}

    def _stored(self) -> list[tuple[str, NDArray[Any]]]:
        """The arrays of the cache by name, keys of all layers first."""
        return sorted(self._cache.items(), key=lambda item: (item[0].endswith(".value"), _layer(item[0])))

    def _allocate(self) -> dict[str, NDArray[Any]]:
        """The cache's arrays by their names behind "past_key_values.", "<layer>.<what>"."""
        small, arrays = is_small_machine(), {}
        for entry in self._session.get_inputs():
            if entry.name.startswith(_PAST):
                name = entry.name.removeprefix(_PAST)
                layer = self._caches[_layer(name)]
                # The node wants a whole window; slots behind n_ctx are never written and take no memory.
                n_slots = max(layer.slots(self.n_ctx), layer.window if layer.kind == "GQA" else 0)
                shape = [size if isinstance(size, int) else n_slots for size in entry.shape]
                arrays[name] = _slots(shape, _ELEMENT_TYPES[entry.type], small)
        return arrays

    def _pieces(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """The pieces to run one after the other: the deeper the cache, the fewer tokens."""
        start = 0
        while start < len(tokens):
            per_token = self._n_heads * (self.n_rows + MAX_PIECE)  # attention scores
            size = min(max(MAX_SCORES // per_token, 1), MAX_PIECE)
            yield tokens[start : start + size]
            start += size

    def _run(self, tokens: Sequence[int], n_logits: int) -> Array:
        """Append tokens; logits of the last `n_logits`, shape (n_logits, vocab)."""
        total = self.n_past + len(tokens)
        self._bind_cache(total - self._n_evicted)
        logits = np.empty((1, n_logits, self.n_vocab), np.float32)
        inputs: dict[str, NDArray[np.int64]] = {
            "input_ids": np.array([tokens], np.int64),
            "position_ids": np.arange(self.n_past, total, dtype=np.int64)[None],
            "num_logits_to_keep": np.array([n_logits], np.int64),
        }
        for name, array in inputs.items():
            self._bind(name, array, array.shape)
        self._n_evicted_input[0] = self._n_evicted
        if self._evicts:
            self._bind(EVICTED, self._n_evicted_input, (1,))
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BackendError(
                f"onnxruntime failed at token {self.n_past} of {self.n_ctx}: {error}"
            ) from error
        self.n_past = total
        self._n_written = max(self._n_written, total)
        return logits.reshape(n_logits, -1)

    def _bind_cache(self, total: int) -> None:
        """Bind the mask and the cache for `total` tokens; layers in heads have all their slots bound."""
        slots = min(-(-total // SLOT_STEP) * SLOT_STEP, self.n_ctx) if self._has_latents else self.n_ctx
        if slots != self._n_bound:
            for name, array in self._cache.items():
                n_slots = array.shape[2]
                if self._caches[_layer(name)].kind == "MLA":
                    n_slots = min(slots, n_slots)
                shape = (1, array.shape[1], n_slots, array.shape[3])
                self._bind(_PAST + name, array, shape)
                self._binding.bind_output(
                    _PRESENT + name, "cpu", 0, array.dtype.type, shape, array.ctypes.data
                )
            self._n_bound = slots
        # Latents ask which slots are in use by their positions, exports of version 1 in heads by the mask's length.
        self._bind("attention_mask", self._ones, (1, slots if self._has_latents else total))

    def _bind(self, name: str, array: NDArray[Any], shape: Sequence[int]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def _layer(name: str) -> int:
    return int(name.partition(".")[0])


def _n_evicted(window: int, n_past: int) -> int:
    """Tokens that GroupQueryAttention has let go of in a cache of window + WINDOW_SLACK slots.

    It moves rows when they are full, WINDOW_SLACK + 1 at once (its description: "Windowed KV Cache").
    """
    behind = max(n_past - window - WINDOW_SLACK, 0)
    return -(-behind // (WINDOW_SLACK + 1)) * (WINDOW_SLACK + 1)


def _open_session(graph: Path, n_threads: int) -> Any:
    """An InferenceSession on the CPU, set for little memory."""
    engine = _onnxruntime()
    options = engine.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Shapes differ from call to call: a memory plan for one only keeps memory from the next.
    options.enable_mem_pattern = False
    try:
        return engine.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise BackendError(f"onnxruntime could not load {graph}: {error}") from error


def _slots(shape: Sequence[int], dtype: type[Any], small_pages: bool) -> NDArray[Any]:
    """Zeros whose pages take memory once they are written.

    NumPy asks for huge pages from 4 MiB on. They make decoding 10 % faster at depth 7600, but the first token
    takes 2 MiB per head at once (260 MiB of SmolLM2's GQA cache of 8192). `small_pages` forbids them.
    """
    if not small_pages:
        return np.zeros(shape, dtype)
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from None
    engine: ModuleType = onnxruntime
    if tuple(int(part) for part in engine.__version__.split(".")[:2]) < OLDEST:
        raise BackendError(
            f"onnxruntime {engine.__version__} is too old: it lacks operators and computes others differently; "
            f"pip install 'onnxruntime>={OLDEST[0]}.{OLDEST[1]}'"
        )
    engine.disable_telemetry_events()
    return engine
