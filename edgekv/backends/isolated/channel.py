"""What the isolated backend and its worker say to each other: small messages in pipes, logits in memory.

A request is an operation and token ids; a reply is a status, the engine's n_past and, for an opened
engine or an error, a JSON text. Logits lie in memory that both map: row t holds the logits of the
request's token t, or row 0 those of the last one.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import struct
import tempfile
from collections.abc import Sequence

import numpy as np

from edgekv.source import Array

MAX_ROWS = 128  # rows of logits in the shared memory; it is touched only as far as it is used
_REQUEST = struct.Struct("<BI")
_REPLY = struct.Struct("<BiI")
_HEADER_NBYTES = mmap.ALLOCATIONGRANULARITY  # holds the abort flag


class Op(enum.IntEnum):
    """What a request asks for."""

    PREFILL = 1  # logits of the last token
    PREFILL_ALL = 2  # logits of every token, at most MAX_ROWS of them
    TRIM = 3  # the one "token" is the new n_past
    LANGUAGE = 4  # what edgekv.tokenizer.language.Language tells of the model as a whole; answered in JSON
    ENCODE = 5  # add_special, parse_special, then the text's UTF-8 bytes; answered in JSON
    TOKEN = 6  # what one token stands for; answered in JSON


class Status(enum.IntEnum):
    """How a request ended."""

    OK = 0
    ERROR = 1
    INTERRUPTED = 2


class ChannelClosed(Exception):
    """The other side is gone."""


class SharedLogits:
    """The memory both sides map: an abort flag, and MAX_ROWS x n_vocab float32."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._header = mmap.mmap(fd, _HEADER_NBYTES)
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
    def aborted(self) -> bool:
        return bool(self.abort_flag[0] != b"\0")

    def set_abort(self, on: bool) -> None:
        self.abort_flag[0] = b"\1" if on else b"\0"

    def close(self) -> None:
        """Close the descriptor; the mappings go with the last reference to them."""
        os.close(self.fd)


class Pipe:
    """One side's two pipe ends."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd

    def send_request(self, op: Op, numbers: Sequence[int]) -> None:
        self._send(_REQUEST.pack(op, len(numbers)) + np.asarray(numbers, np.int32).tobytes())

    def receive_request(self) -> tuple[Op, list[int]]:
        op, count = _REQUEST.unpack(self._receive(_REQUEST.size))
        return Op(op), np.frombuffer(self._receive(4 * count), np.int32).tolist()

    def send_reply(self, status: Status, n_past: int, text: str = "") -> None:
        payload = text.encode()
        self._send(_REPLY.pack(status, n_past, len(payload)) + payload)

    def receive_reply(self) -> tuple[Status, int, str]:
        status, n_past, size = _REPLY.unpack(self._receive(_REPLY.size))
        return Status(status), n_past, self._receive(size).decode()

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _send(self, message: bytes) -> None:
        try:
            while message:
                message = message[os.write(self._write_fd, message) :]
        except BrokenPipeError as error:
            raise ChannelClosed from error

    def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._read_fd, size)
            if not part:
                raise ChannelClosed
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
