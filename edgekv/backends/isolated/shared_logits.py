"""Logits, abort flag, n_past and cached rows in memory that the isolated backend shares with its child."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

from edgekv.cache.rows import Bytes
from edgekv.files import unnamed_file
from edgekv.source import Array

MAX_ROWS = 128  # rows of logits; rows that are never written take no memory
_HEADER_NBYTES = mmap.ALLOCATIONGRANULARITY


class Header(ctypes.Structure):
    """The abort flag, and the tokens in the engine's cache, which the child keeps up to date."""

    _fields_ = (("abort_flag", ctypes.c_char * 2), ("n_past", ctypes.c_int32))


class SharedLogits:
    """Logits (MAX_ROWS, n_vocab), float32: row t is that of a request's token t, or row 0 the last token's.

    Attributes:
        abort_flag: that of the header: two bytes; a call in progress ends when the first is set.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.header = Header.from_buffer(mmap.mmap(fd, _HEADER_NBYTES))
        self.abort_flag = (ctypes.c_char * 2).from_buffer(self.header)
        self._n_vocab = 0

    @classmethod
    def create(cls) -> SharedLogits:
        """New memory, without a name in the file system."""
        fd = unnamed_file("edgekv-logits")
        os.ftruncate(fd, _HEADER_NBYTES)
        return cls(fd)

    def map_rows(self, n_vocab: int) -> None:
        """Map the logits, once n_vocab is known; the first process to do so grows the memory."""
        nbytes = MAX_ROWS * n_vocab * 4
        if os.fstat(self.fd).st_size < _HEADER_NBYTES + nbytes:
            os.ftruncate(self.fd, _HEADER_NBYTES + nbytes)
        self._n_vocab = n_vocab
        rows = mmap.mmap(self.fd, nbytes, offset=_HEADER_NBYTES)
        self._rows: Array = np.frombuffer(rows, np.float32).reshape(MAX_ROWS, n_vocab)

    def map_bytes(self, nbytes: int) -> Bytes:
        """Map bytes behind the logits, for cached rows on their way; `drop_bytes` gives their memory back.

        No process may touch an earlier mapping after that.
        """
        if not nbytes:
            return np.empty(0, np.uint8)
        start = self._end_of_rows()
        if os.fstat(self.fd).st_size < start + nbytes:
            os.ftruncate(self.fd, start + nbytes)
        return np.frombuffer(mmap.mmap(self.fd, nbytes, offset=start), np.uint8)

    def drop_bytes(self) -> None:
        """Give the memory of mapped bytes back."""
        if self.fd >= 0:
            os.ftruncate(self.fd, self._end_of_rows())

    def write(self, logits: Array) -> None:
        """Write logits (vocab,) or (t, vocab) to the first rows."""
        rows = logits.reshape(-1, self._n_vocab)
        self._rows[: len(rows)] = rows

    def read(self, count: int) -> Array:
        """A copy of the first rows, (count, vocab)."""
        return self._rows[:count].copy()

    @property
    def aborted(self) -> bool:
        return bool(self.abort_flag[0] != b"\0")

    def set_abort(self, on: bool) -> None:
        self.abort_flag[0] = b"\1" if on else b"\0"

    def close(self) -> None:
        """Close the descriptor; the mappings go with the last reference to them."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _end_of_rows(self) -> int:
        """The offset behind the logits, at which a mapping may begin."""
        nbytes = _HEADER_NBYTES + MAX_ROWS * self._n_vocab * 4
        return -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
