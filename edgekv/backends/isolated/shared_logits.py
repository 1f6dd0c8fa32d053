"""Logits in memory that the isolated backend and its child both map, with the abort flag and the engine's n_past."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import numpy as np

from edgekv.source import Array

MAX_ROWS = 128  # rows of logits; the memory is touched only as far as it is used
_HEADER_NBYTES = mmap.ALLOCATIONGRANULARITY


class _Header(ctypes.Structure):
    _fields_ = (("abort_flag", ctypes.c_char * 2), ("n_past", ctypes.c_int32))


class SharedLogits:
    """MAX_ROWS x n_vocab float32: row t holds the logits of a request's token t, or row 0 those of the last one.

    Attributes:
        abort_flag: two bytes; a call in progress ends when the first is set.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._header = _Header.from_buffer(mmap.mmap(fd, _HEADER_NBYTES))
        self.abort_flag = (ctypes.c_char * 2).from_buffer(self._header)
        self._n_vocab = 0

    @classmethod
    def create(cls) -> SharedLogits:
        """New memory without a name in the file system, where the system can."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("edgekv-logits")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _HEADER_NBYTES)
        return cls(fd)

    def map_rows(self, n_vocab: int) -> None:
        """Map the logits, once the size of the vocabulary is known; the side that knows it first grows it."""
        nbytes = MAX_ROWS * n_vocab * 4
        if os.fstat(self.fd).st_size < _HEADER_NBYTES + nbytes:
            os.ftruncate(self.fd, _HEADER_NBYTES + nbytes)
        self._n_vocab = n_vocab
        rows = mmap.mmap(self.fd, nbytes, offset=_HEADER_NBYTES)
        self._rows: Array = np.frombuffer(rows, np.float32).reshape(MAX_ROWS, n_vocab)

    def write(self, logits: Array) -> None:
        """Put logits (vocab,) or (t, vocab) into the first rows."""
        rows = logits.reshape(-1, self._n_vocab)
        self._rows[: len(rows)] = rows

    def read(self, count: int) -> Array:
        """A copy of the first rows, (count, vocab)."""
        return self._rows[:count].copy()

    @property
    def n_past(self) -> int:
        """Tokens in the engine's cache, kept by the child."""
        return int(self._header.n_past)

    @n_past.setter
    def n_past(self, count: int) -> None:
        self._header.n_past = count

    @property
    def aborted(self) -> bool:
        return bool(self.abort_flag[0] != b"\0")

    def set_abort(self, on: bool) -> None:
        self.abort_flag[0] = b"\1" if on else b"\0"

    def close(self) -> None:
        """Close the descriptor; the mappings go with the last reference to them."""
        os.close(self.fd)
