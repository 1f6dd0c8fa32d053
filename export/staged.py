"""A model on its way through llama.cpp's quantization: a GGUF beside the output that fills while it is read.

llama_model_quantize takes a file. Its header is here at once and its tensors follow in the order in which
they are read, so that reading a Hugging Face folder and quantizing it take the time of the slower, not of both.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgekv.export.gguf import begin_gguf, stored_as, stored_weights, tensor_nbytes
from edgekv.export.gguf_arch import file_layout
from gguf import GGMLQuantizationType as QuantType

from edgekv.files import scratch_path
from edgekv.gguf_check import read_header
from edgekv.source import TensorSource

LATENT_ENCODER = "attn_kv_a_mqa.weight"
ALIGNMENT = 32  # bytes: gguf-py's and llama.cpp's default
Progress = Callable[[int, int], None]
_BLOCK = re.compile(r"blk\.(\d+)\.")


class StagedGGUF:
    """A GGUF at `path` whose tensors are being written."""

    def __init__(self, path: Path, source: TensorSource, plan: Mapping[str, QuantType]) -> None:
        self.path = path
        self._source = source
        self._plan = plan
        self._offsets = {tensor.name: tensor.offset for tensor in read_header(path).tensors}
        self._written: set[str] = set()
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def wait(self, name: str) -> None:
        """Return when a tensor is in the file.

        Raises:
            EdgeKVError: whatever kept it from being read or written.
        """
        with self._changed:
            self._changed.wait_for(lambda: name in self._written or self._error)
            if name not in self._written:
                assert self._error is not None
                raise self._error

    def wait_all(self, progress: Progress) -> None:
        """Return when all of them are; raises as `wait` does."""
        for done, name in enumerate(_reading_order(self._plan), start=1):
            self.wait(name)
            progress(done, len(self._plan))

    def stop(self) -> None:
        """End the writing."""
        self._stopped = True
        self._thread.join()

    def _fill(self) -> None:
        try:
            with self.path.open("r+b", buffering=0) as file:
                for name in _reading_order(self._plan):
                    if self._stopped:
                        return
                    file.seek(self._offsets[name])
                    stored_as(self._source, name, self._plan[name]).tofile(file)
                    with self._changed:
                        self._written.add(name)
                        self._changed.notify_all()
        except BaseException as error:  # for whoever waits
            with self._changed:
                self._error = error
                self._changed.notify_all()


@contextmanager
def staged_gguf(source: TensorSource, output: Path) -> Iterator[StagedGGUF]:
    """A source as a GGUF, its weights as they are stored, in a hidden file beside `output` until the end.

    Raises:
        OutputError: the folder is not writable, or there is no room for a file of the source's size.
    """
    source = file_layout(source)
    with scratch_path(output) as path:
        writer, plan = begin_gguf(source, path, stored_weights(source), {})
        writer.close()
        _extend(path, source, plan)
        staged = StagedGGUF(path, source, plan)
        try:
            yield staged
        finally:
            staged.stop()


def _extend(path: Path, source: TensorSource, plan: Mapping[str, QuantType]) -> None:
    """Give the file its final size, without its data."""
    size = _padded(path.stat().st_size)
    size += sum(_padded(tensor_nbytes(source.shape(name), quant)) for name, quant in plan.items())
    with path.open("r+b") as file:
        file.truncate(size)


def _padded(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _reading_order(names: Mapping[str, QuantType]) -> list[str]:
    """As llama.cpp reads: by block, then by name (src/llama-model-loader.h, weight_name_comparer).

    Before them what quantize_gguf looks at beforehand.
    """

    def key(name: str) -> tuple[bool, int, str]:
        block = _BLOCK.match(name)
        return (not name.endswith(LATENT_ENCODER), int(block[1]) if block else -1, name)

    return sorted(names, key=key)
