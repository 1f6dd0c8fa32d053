"""Reference distributions: the next-token distributions of the model to compare with, computed once, kept on disk."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from edgekv.backends.base import Backend
from edgekv.errors import BackendError, OutputError
from edgekv.evaluate.journal import open_held
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.top_and_tail import SAMPLES, TOP, CompactRows, compact
from edgekv.evaluate.workers import Run, run_units
from edgekv.text.scored import Text, scored_logits

_CRC_NBYTES = 4


class ReferenceStore:
    """Windows of `n_rows` compact rows each; `len` is the number of windows."""

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
                f"cannot store reference distributions: {error.strerror}; free {len(data) >> 20} MiB per window, "
                "or choose another --cache-dir"
            ) from error
        self._count += 1

    def read(self, window: int) -> CompactRows:
        """A stored window."""
        assert window < self._count, (window, self._count)
        data = self._load(window)
        if data is None:
            raise OutputError(
                "the stored reference distributions changed during the run; run again with --fresh"
            )
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


class Reference:
    """A reference's distributions at a text's scored predictions.

    `key` is a hash of model, engine and protocol.
    """

    def __init__(self, subject: ModelUnderTest, text: Text, store: ReferenceStore, key: str) -> None:
        self._subject, self._text, self._store = subject, text, store
        self.key = key

    def fill(self, run: Run) -> None:
        """Run the reference on the windows that the store lacks.

        Raises:
            BackendError: the engine failed, or gave logits that are not finite.
        """
        total = len(self._text.windows)
        if len(self._store) >= total:
            return
        run.progress(len(self._store), total, "")
        items = ((i, self._text.window(i), self._text.first) for i in range(len(self._store), total))
        for rows in run_units(self._subject, self._text.length, run, compact_window, items):
            self._store.append(rows)
            run.progress(len(self._store), total, "")

    def read(self, window: int) -> CompactRows:
        """The distributions of a window that `fill` has made."""
        return self._store.read(window)


def compact_window(backend: Backend, item: tuple[int, list[int], int]) -> CompactRows:
    """The distributions of one window: its index, its tokens, the position of the first scored prediction."""
    index, tokens, first = item
    rng = np.random.default_rng(index)
    parts = []
    for targets, logits in scored_logits(backend, tokens, first):
        if not np.isfinite(logits).all():
            raise BackendError(
                f"the reference's logits are not finite in window {index}; its file may be damaged: try "
                "`edgekv chat` on it"
            )
        parts.append(compact(logits, targets, rng))
    return CompactRows.join(parts)


@contextmanager
def open_reference(
    subject: ModelUnderTest, text: Text, vocab: int, folder: Path, fresh: bool
) -> Iterator[Reference]:
    """The reference with what earlier runs left in `folder`; raises as journal.open_held does."""
    identity = subject.identity() | text.identity()
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    layout = {"rows": text.n_scored, "vocab": vocab, "top": TOP, "samples": SAMPLES}
    with open_held(folder, "reference", identity | layout, fresh) as file:
        yield Reference(subject, text, ReferenceStore(file, text.n_scored, vocab), key)
