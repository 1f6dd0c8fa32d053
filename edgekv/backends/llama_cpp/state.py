"""The state of one llama.cpp sequence as cached rows, and back.

Layout of the bytes: llama_context::state_seq_get_data in src/llama-context.cpp, then llama_kv_cache::state_write in
src/llama-kv-cache.cpp. Only a plain llama_kv_cache is read: windowed, recurrent and hybrid memories write several,
and models with positions in two dimensions write more about each cell.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.rows import Bytes, CacheRows, Layout, Plane
from edgekv.errors import UnsupportedError
from edgekv.quant.formats import BY_GGML_ID, FORMATS, Format

CELL = np.dtype([("position", "<i4"), ("n_sequences", "<u4"), ("sequence", "<i4")])
# Of sequences whose number is n_seq_max or more, which a batch does not know: llama.cpp does not write the number.
SHORT_CELL = np.dtype([("position", "<i4"), ("n_sequences", "<u4")])
_HEADER = struct.Struct("<IiII")  # magic number, sequence, streams, cells
_CELL = struct.Struct("<iI")  # position, sequences
_LAYERS = struct.Struct("<II")  # whether values are transposed, layers
_ROWS = struct.Struct("<iQ")  # ggml type, bytes per row
_COLUMNS = struct.Struct("<iII")  # ggml type, bytes per value, values per token


@dataclass(frozen=True)
class StateFormat:
    """What one context writes into its states beside the rows.

    Attributes:
        magic: the state's first number, which changes with llama.cpp's format.
        transposed: whether values lie token by token within each of their dims, as without flash attention.
    """

    magic: int
    transposed: bool
    layout: Layout


@dataclass(frozen=True)
class StoredRows:
    """The rows of one sequence as llama.cpp stores them.

    Attributes:
        planes: memory (n, bytes) of each plane of the layout: of a state, or of the cache itself.
        positions: of the S rows, ascending.
        places: which of the n rows each of them is, (S,).
        are_cells: whether the planes are the cache itself, and the places its cells.
    """

    layout: Layout
    planes: list[Bytes]
    positions: NDArray[np.int32]
    places: NDArray[np.int64]
    are_cells: bool

    @classmethod
    def of_state(cls, state: Bytes, encodings: tuple[str, str]) -> StoredRows:
        """Those of a state; raises as `read_cells` does."""
        form, positions, planes = read_cells(state, encodings)
        order = np.argsort(positions)
        return cls(form.layout, planes, positions[order], order, are_cells=False)

    def plane(self, index: int, start: int = 0) -> Bytes:
        """A copy of a plane's rows by position, from the row `start` on, (S, bytes)."""
        return self.planes[index][self.places[start:]]


class _Reader:
    def __init__(self, state: Bytes) -> None:
        self._state, self._at = state, 0

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        found: tuple[int, ...] = form.unpack(self.take(form.size).tobytes())
        return found

    def take(self, nbytes: int) -> Bytes:
        """The next bytes, as a view."""
        if not 0 <= nbytes <= self.left:
            raise ValueError("the state ends early")
        self._at += nbytes
        return self._state[self._at - nbytes : self._at]

    def peek(self, form: struct.Struct) -> tuple[int, ...]:
        """The next numbers, which stay."""
        at = self._at
        found = self.unpack(form)
        self._at = at
        return found

    @property
    def left(self) -> int:
        return len(self._state) - self._at


def read_state(state: Bytes, encodings: tuple[str, str], start: int = 0) -> tuple[StateFormat, CacheRows]:
    """The format of a state with at least one token, and its rows from token `start` on.

    Args:
        state: the bytes that llama_state_seq_get_data wrote.
        encodings: Plane.encoding of keys and of values.

    Raises:
        UnsupportedError: it is no state of a plain cache of tokens at positions 0, 1, 2 and so on.
    """
    try:
        return _read(state, encodings, start)
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"llama.cpp keeps more of this model than one plain cache ({error}); it cannot be saved, only prefilled "
            "again"
        ) from error


def _read(state: Bytes, encodings: tuple[str, str], start: int) -> tuple[StateFormat, CacheRows]:
    form, positions, taken = read_cells(state, encodings)
    expected = np.arange(len(positions))
    order = None  # of the cells by position, which in a cache of several sequences lie anywhere
    if not (positions == expected).all():
        order = np.argsort(positions, kind="stable")
        if not (positions[order] == expected).all():
            raise ValueError("its tokens do not lie at positions 0, 1, 2 and so on")
    rows = CacheRows.empty(form.layout, len(positions) - start)
    for target, array in zip(rows.planes(), taken, strict=True):
        target[:] = array[start:] if order is None else array[order[start:]]
    return form, rows


def read_cells(
    state: Bytes, encodings: tuple[str, str]
) -> tuple[StateFormat, NDArray[np.int32], list[Bytes]]:
    """The format of a state, the position of each cell, and each plane's rows in the same order, as views.

    Raises:
        ValueError, KeyError: it is no state of a plain cache.
    """
    reader = _Reader(state)
    magic, _, n_streams, n_cells = reader.unpack(_HEADER)
    if n_streams != 1:
        raise ValueError(f"it has {n_streams} streams")
    positions = _positions(reader, n_cells)
    transposed, n_layers = reader.unpack(_LAYERS)
    names = [f"{i}.key" for i in range(n_layers)]
    taken = [_take_rows(reader, name, n_cells) for name in names]
    if reader.left:
        take = _take_columns if transposed else _take_rows
        taken += [take(reader, f"{i}.value", n_cells) for i in range(n_layers)]
    else:  # MLA has no values of its own, and its graph rotates no keys
        encodings = ("", "")
    if reader.left:
        raise ValueError(f"its state has {reader.left} bytes too many")
    layout = tuple(
        Plane(name, form.name, values, encodings[name.endswith(".value")]) for name, form, values, _ in taken
    )
    return StateFormat(magic, bool(transposed), layout), positions, [array for *_, array in taken]


def _positions(reader: _Reader, n_cells: int) -> NDArray[np.int32]:
    _, n_sequences = reader.peek(_CELL)
    kind = CELL if n_sequences else SHORT_CELL
    cells = np.frombuffer(reader.take(n_cells * kind.itemsize), kind)
    if n_sequences > 1 or not (cells["n_sequences"] == n_sequences).all():
        raise ValueError("its tokens are shared")
    positions: NDArray[np.int32] = cells["position"]
    return positions


Taken = tuple[str, Format, int, Bytes]  # a plane's name, format, values per token, and rows


def _take_rows(reader: _Reader, name: str, n_cells: int) -> Taken:
    ggml_id, nbytes = reader.unpack(_ROWS)
    form = BY_GGML_ID[ggml_id]
    if not nbytes or nbytes % form.block_nbytes:
        raise ValueError(f"rows of {nbytes} bytes are no {form.name}")
    rows = reader.take(n_cells * nbytes).reshape(n_cells, nbytes)
    return name, form, nbytes // form.block_nbytes * form.block, rows


def _take_columns(reader: _Reader, name: str, n_cells: int) -> Taken:
    ggml_id, size, values = reader.unpack(_COLUMNS)
    form = BY_GGML_ID[ggml_id]
    if form.block != 1 or form.block_nbytes != size:
        raise ValueError(f"transposed values of {size} bytes are no {form.name}")
    columns = reader.take(values * n_cells * size).reshape(values, n_cells, size)
    return name, form, values, columns.swapaxes(0, 1).reshape(n_cells, -1)


def write_state(form: StateFormat, rows: CacheRows) -> Bytes:
    """The bytes for llama_state_seq_set_data that put rows at positions 0, 1, 2 and so on of any sequence."""
    n = rows.n_tokens
    cells = np.zeros(n, CELL)
    cells["position"], cells["n_sequences"] = np.arange(n), 1
    keys = [plane for plane in form.layout if plane.name.endswith(".key")]
    parts = [
        np.frombuffer(_HEADER.pack(form.magic, 0, 1, n), np.uint8),
        cells.view(np.uint8),
        np.frombuffer(_LAYERS.pack(form.transposed, len(keys)), np.uint8),
    ]
    for plane, array in zip(form.layout, rows.planes(), strict=True):
        ggml_id = FORMATS[plane.cache_type].ggml_id
        if form.transposed and plane not in keys:
            size = FORMATS[plane.cache_type].block_nbytes
            parts.append(np.frombuffer(_COLUMNS.pack(ggml_id, size, plane.values), np.uint8))
            array = array.reshape(n, plane.values, size).swapaxes(0, 1)
        else:
            parts.append(np.frombuffer(_ROWS.pack(ggml_id, plane.nbytes), np.uint8))
        parts.append(array.reshape(-1))
    return np.concatenate(parts)
