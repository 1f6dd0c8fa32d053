"""The rows of a llama.cpp sequence where they lie: a copy would take as much memory as the cache.

llama_state_seq_get_data copies all planes at once. The writer that it passes to llama_kv_cache::state_write, a
llama_io_write_host (src/llama-context.cpp), copies headers and cells, but only notes the ranges of tensors and copies
them when it is destroyed. One that is never destroyed tells where all rows are, and copies none.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.llama_cpp.importance import Tensor, require_known_layout
from edgekv.backends.llama_cpp.kernel.ggml import ggml
from edgekv.backends.llama_cpp.library import is_a, llama
from edgekv.backends.llama_cpp.state import StoredRows, read_cells
from edgekv.cache.rows import Bytes
from edgekv.errors import BackendError

KNOWN_GGML = b"0.25.3"  # of llama-cpp-python 0.3.36: only there the layout of _HostWriter is known
_PREFIX = 8  # magic number and sequence: llama_context writes these in front of what its memory writes
_RANGE = np.dtype([("tensor", "<u8"), ("target", "<u8"), ("nbytes", "<u8"), ("offset", "<u8")])


class _HostWriter(ctypes.Structure):
    """llama_io_write_host; `ranges` is a std::vector of _RANGE, by begin, end and end of storage."""

    _fields_ = (
        ("vtable", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("left", ctypes.c_size_t),
        ("written", ctypes.c_size_t),
        ("ranges", ctypes.c_void_p * 3),
    )


def rows_in_place(memory: int, state_nbytes: int, encodings: tuple[str, str]) -> StoredRows | None:
    """The rows of sequence 0, valid until the cache changes; None where llama.cpp does not show them.

    Args:
        memory: a llama_memory_t.
        state_nbytes: what llama_state_seq_get_size says of the sequence.
        encodings: Plane.encoding of keys and of values.
    """
    try:
        if not is_a("llama_kv_cache", memory) or ggml("ggml_version")() != KNOWN_GGML:
            return None
        # Of a size that only a whole state needs: what is not written takes no memory, if pages are small.
        with_holes = mmap.mmap(-1, state_nbytes)
        with contextlib.suppress(OSError):  # a kernel that has no others
            with_holes.madvise(mmap.MADV_NOHUGEPAGE)
        ranges = _write(memory, with_holes)
        form, positions, _ = read_cells(np.frombuffer(with_holes, np.uint8), encodings)
        if form.transposed or not len(ranges):
            return None
        by_plane = ranges.reshape(len(form.layout), -1)
        planes = [_host_memory(int(plane[0]["tensor"])) for plane in by_plane]
        cells = _cells(by_plane[0], form.layout[0].nbytes)
    except (AttributeError, ValueError, KeyError, BackendError):
        return None  # other symbols, another kind of cache, or one in the memory of a GPU
    order = np.argsort(positions)
    return StoredRows(form.layout, planes, positions[order], cells[order], are_cells=True)


def _write(memory: int, target: mmap.mmap) -> Any:
    """Have the cache written but for its tensors; the ranges of these, (planes * ranges,)."""
    library = llama()._lib
    state_write = library["_ZNK14llama_kv_cache11state_writeER16llama_io_write_iij"]
    state_write.argtypes, state_write.restype = (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint],
        None,
    )
    vtable = ctypes.addressof(ctypes.c_char.in_dll(library, "_ZTV19llama_io_write_host"))
    start = ctypes.addressof(ctypes.c_char.from_buffer(target))
    writer = _HostWriter(vtable + 16, start + _PREFIX, len(target) - _PREFIX)
    state_write(memory, ctypes.byref(writer), 0, 0)
    begin, end, _ = writer.ranges
    if begin is None:
        return np.zeros(0, _RANGE)
    ranges = np.frombuffer(ctypes.string_at(begin, end - begin), _RANGE)
    ctypes.CDLL(None).free(ctypes.c_void_p(begin))
    return ranges


def _host_memory(address: int) -> Bytes:
    """All rows of a plane's tensor, (cells, bytes)."""
    require_known_layout(address)
    tensor = Tensor.from_address(address)
    is_host = llama()._lib.ggml_backend_buffer_is_host
    is_host.argtypes, is_host.restype = [ctypes.c_void_p], ctypes.c_bool
    if not is_host(tensor.buffer):
        raise BackendError("the cache lies in the memory of a GPU")
    n_cells, nbytes = int(tensor.ne[1]), int(tensor.nb[1])
    memory = (ctypes.c_char * (n_cells * nbytes)).from_address(tensor.data)
    return np.frombuffer(memoryview(memory), np.uint8).reshape(n_cells, nbytes)


def _cells(ranges: Any, row_nbytes: int) -> NDArray[np.int64]:
    """The cells of one plane's ranges, in their order."""
    starts, counts = (ranges[name].astype(np.int64) // row_nbytes for name in ("offset", "nbytes"))
    firsts = np.repeat(starts - np.cumsum(counts) + counts, counts)
    return np.asarray(firsts + np.arange(len(firsts)), np.int64)
