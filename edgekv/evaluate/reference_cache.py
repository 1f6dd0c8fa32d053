"""A reference model's distributions on disk: computed once, compared with many candidates.

One record a window, appended in order, each closed by its CRC-32: token ids in the fewest bytes that hold the
vocabulary, log-probabilities, tails and target losses in float32. 1,160 bytes a scored position for up to 65,536
tokens, where 16-bit log-probabilities of a vocabulary of 49,152 would take 98,304.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from edgekv.errors import OutputError
from edgekv.evaluate.compact import SAMPLES, TOP, CompactRows
from edgekv.evaluate.journal import Identity, open_held

_CRC_NBYTES = 4


class ReferenceStore:
    """Windows of `n_rows` compact rows each; `len` tells how many there are."""

    def __init__(self, file: IO[bytes], n_rows: int, vocab: int) -> None:
        self._file = file
        self._base = file.tell()
        self._top = min(TOP, vocab)
        kept = (n_rows, self._top + SAMPLES)
        id_type = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        real = np.dtype("<f4")
        self._fields = ((id_type, kept), (real, kept), (real, (n_rows,)), (real, (n_rows,)))
        self._record_nbytes = _CRC_NBYTES + sum(
            kind.itemsize * int(np.prod(shape)) for kind, shape in self._fields
        )
        self._count = 0
        while self._load(self._count) is not None:
            self._count += 1
        file.truncate(self._base + self._count * self._record_nbytes)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: CompactRows) -> None:
        """Store the next window."""
        arrays = (rows.ids, rows.log_p, rows.tail, rows.nll)
        parts = []
        for (kind, shape), array in zip(self._fields, arrays, strict=True):
            assert array.shape == shape, (array.shape, shape)
            parts.append(array.astype(kind).tobytes())
        data = b"".join(parts)
        self._file.seek(0, 2)
        try:
            self._file.write(data + zlib.crc32(data).to_bytes(_CRC_NBYTES, "little"))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot store reference distributions: {error.strerror}; free {len(data) >> 20} MiB a window, "
                "or choose another --cache-dir"
            ) from error
        self._count += 1

    def read(self, window: int) -> CompactRows:
        """A window that is stored."""
        assert window < self._count, (window, self._count)
        data = self._load(window)
        if data is None:
            raise OutputError("the stored reference distributions changed under way; run again with --fresh")
        arrays = []
        for kind, shape in self._fields:
            size = kind.itemsize * int(np.prod(shape))
            arrays.append(np.frombuffer(data[:size], kind).reshape(shape))
            data = data[size:]
        ids, log_p, tail, nll = arrays
        return CompactRows(self._top, ids.astype(np.uint32), log_p, tail, nll)

    def _load(self, window: int) -> bytes | None:
        """A record's content, or None if it is not there or not whole."""
        self._file.seek(self._base + window * self._record_nbytes)
        record = self._file.read(self._record_nbytes)
        data, crc = record[:-_CRC_NBYTES], record[-_CRC_NBYTES:]
        whole = len(record) == self._record_nbytes and zlib.crc32(data) == int.from_bytes(crc, "little")
        return data if whole else None


@contextmanager
def open_reference_store(
    folder: Path, identity: Identity, n_rows: int, vocab: int, fresh: bool = False
) -> Iterator[ReferenceStore]:
    """The store of a reference's identity; raises as edgekv.evaluate.journal.open_held does."""
    layout = {"rows": n_rows, "vocab": vocab, "top": TOP, "samples": SAMPLES}
    with open_held(folder, "reference", {**identity, **layout}, fresh) as file:
        yield ReferenceStore(file, n_rows, vocab)
