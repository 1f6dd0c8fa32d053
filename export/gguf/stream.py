"""A stream in the form of a file: a GGUF that llama.cpp reads while EdgeKV writes it.

llama_model_quantize takes a path. The file behind it has its header and its full length from the start; a thread
writes the tensors in the order in which llama.cpp reads them, and every read waits for its tensor (StagedGGUF.wait).
So reading a Hugging Face folder and quantizing it take the time of the slower one, not the sum of both.

After a tensor was read, its pages are given back (a hole is punched into the file), but for the rows that are compared
afterwards. The file therefore takes a few hundred megabytes, whatever its length says. It lies in memory if nobody
needs it as a whole (Linux; elsewhere it takes the room of the model on the disk).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import inf, prod
from pathlib import Path
from typing import BinaryIO

from gguf import GGMLQuantizationType as QuantType

from edgekv.export.gguf.file_layout import file_layout
from edgekv.export.gguf.write import begin_gguf, stored_as, stored_weights, tensor_nbytes
from edgekv.files import scratch_path
from edgekv.models.gguf.header import read_header
from edgekv.progress import Progress
from edgekv.quant.tensor_error import compared_rows
from edgekv.source import TensorSource

LATENT_ENCODER = "attn_kv_a_mqa.weight"
AHEAD_NBYTES = 2**27  # written before it is read: enough that llama.cpp never waits
MAX_MEMORY_NBYTES = 2**29  # of compared rows; more of them go to the disk
PAGE_NBYTES = 4096
_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h
ALIGNMENT = 32  # bytes: gguf-py's and llama.cpp's default
_BLOCK = re.compile(r"blk\.(\d+)\.")


class StagedGGUF:
    """A GGUF at `path` whose tensors are being written by a thread of its own, until `stop`."""

    def __init__(self, path: Path, source: TensorSource, plan: Mapping[str, QuantType]) -> None:
        self.path = path
        self._source = source
        self._plan = plan
        self._offsets = {tensor.name: tensor.offset for tensor in read_header(path).tensors}
        self._sizes = {name: tensor_nbytes(source.shape(name), quant) for name, quant in plan.items()}
        self._written: set[str] = set()
        self._read: set[str] = set()
        self._reading = self._wanted = ""
        self._ahead_nbytes = 0  # written and not yet read
        self._limit_nbytes: float = AHEAD_NBYTES
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._file = path.open("r+b", buffering=0)
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def wait(self, name: str) -> None:
        """Return when a tensor is in the file.

        Raises:
            EdgeKVError: whatever kept it from being read or written.
        """
        with self._changed:
            self._wanted = name
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._written or self._error)
            if name not in self._written:
                assert self._error is not None
                raise self._error

    def wait_all(self, progress: Progress) -> None:
        """Return when all tensors are in the file; raises as `wait` does."""
        self._limit_nbytes = inf
        for done, name in enumerate(_reading_order(self._plan), start=1):
            self.wait(name)
            progress(done, len(self._plan))

    @property
    def unread(self) -> set[str]:
        """Tensors that the reader did not go on to."""
        return set(self._plan) - self._read

    def go_on_to(self, name: str) -> None:
        """As `wait`, for a reader that goes through the tensors: the one before is read, and its pages are given back.

        "" says that the last one is read, too.
        """
        if self._reading:
            self._free(self._reading)
        self._reading = name
        if name:
            self._read.add(name)
            self.wait(name)

    def _free(self, name: str) -> None:
        with self._changed:
            self._ahead_nbytes -= self._counted(name)
            self._changed.notify_all()
        shape, row = self._source.shape(name), self._sizes[name] // prod(self._source.shape(name)[:-1])
        end = self._offsets[name]
        for start, stop in compared_rows(shape):
            _give_back(self._file, end, self._offsets[name] + start * row)
            end = self._offsets[name] + stop * row
        _give_back(self._file, end, self._offsets[name] + self._sizes[name])

    def stop(self) -> None:
        """End the writing."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._file.close()

    def _counted(self, name: str) -> int:
        """Bytes of a tensor that count as written ahead; latent encoders are written before anything is read."""
        return 0 if name.endswith(LATENT_ENCODER) else self._sizes[name]

    def _may_write(self) -> bool:
        behind = bool(self._wanted) and self._wanted not in self._written
        return behind or self._stopped or self._ahead_nbytes < self._limit_nbytes

    def _fill(self) -> None:
        try:
            for name in _reading_order(self._plan):
                with self._changed:
                    self._changed.wait_for(self._may_write)
                if self._stopped:
                    return
                self._file.seek(self._offsets[name])
                stored_as(self._source, name, self._plan[name]).tofile(self._file)
                with self._changed:
                    self._written.add(name)
                    self._ahead_nbytes += self._counted(name)
                    self._changed.notify_all()
        except BaseException as error:  # for whoever waits
            with self._changed:
                self._error = error
                self._changed.notify_all()


@contextmanager
def staged_gguf(source: TensorSource, output: Path, whole: bool = False) -> Iterator[StagedGGUF]:
    """A source as a GGUF that is written while it is read, its weights as they are stored; gone after the block.

    Args:
        output: the file that will be made of it: where the stream lies on the disk, it is a hidden file beside that.
        whole: keep every tensor until the end, for a reader that comes before the quantization (wait_all).

    Raises:
        OutputError: the folder is not writable, or there is no room for the file.
    """
    source = file_layout(source)
    weights = stored_weights(source)
    with ExitStack() as stack:
        path = stack.enter_context(scratch_path(output))
        writer, plan = begin_gguf(source, path, weights, {})
        writer.close()
        if not whole and sys.platform == "linux" and _compared_nbytes(source, plan) < MAX_MEMORY_NBYTES:
            path = stack.enter_context(_in_memory(path))
        _extend(path, source, plan)
        staged = StagedGGUF(path, source, plan)
        stack.callback(staged.stop)
        yield staged


@contextmanager
def _in_memory(path: Path) -> Iterator[Path]:
    """A file's copy in memory, gone with this process."""
    with os.fdopen(os.memfd_create(path.name), "wb") as file:
        file.write(path.read_bytes())
        file.flush()
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _compared_nbytes(source: TensorSource, plan: Mapping[str, QuantType]) -> int:
    total = 0
    for name, quant in plan.items():
        shape = source.shape(name)
        rows = sum(stop - start for start, stop in compared_rows(shape))
        total += tensor_nbytes((rows, shape[-1]), quant)
    return total


def _extend(path: Path, source: TensorSource, plan: Mapping[str, QuantType]) -> None:
    """Give the file its final size, without its data."""
    sizes = [path.stat().st_size, *(tensor_nbytes(source.shape(name), quant) for name, quant in plan.items())]
    os.truncate(path, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))


def _give_back(file: BinaryIO, start: int, stop: int) -> None:
    """Make a hole of the whole pages between two offsets, where the system can."""
    start, stop = -(-start // PAGE_NBYTES) * PAGE_NBYTES, stop // PAGE_NBYTES * PAGE_NBYTES
    if sys.platform == "linux" and stop > start:
        # A file system without holes refuses: then the room is used until the end.
        offsets = ctypes.c_int64(start), ctypes.c_int64(stop - start)
        ctypes.CDLL(None).fallocate(file.fileno(), _PUNCH_HOLE, *offsets)


def _reading_order(names: Mapping[str, QuantType]) -> list[str]:
    """As llama.cpp reads: by block, then by name (src/llama-model-loader.h, weight_name_comparer).

    Before them what quantize_gguf looks at beforehand.
    """

    def key(name: str) -> tuple[bool, int, str]:
        block = _BLOCK.match(name)
        return (not name.endswith(LATENT_ENCODER), int(block[1]) if block else -1, name)

    return sorted(names, key=key)
