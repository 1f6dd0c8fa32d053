"""External data of ONNX files: where they say that their weights are, read without the `onnx` package.

A reader of just enough protobuf (onnx/onnx.proto) to find every tensor with external data, in subgraphs and
functions too. Names in external data have led readers out of the model's folder (CVE-2022-25882,
CVE-2024-27318, CVE-2025-51480); EdgeKV's own exports know one data file, so any other name is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edgekv.errors import ModelFileError

MAX_GRAPH_NBYTES = 256 * 2**20  # a graph without its weights takes a few MB
MAX_DEPTH = 32  # of subgraphs in nodes in subgraphs
_EXTERNAL_DATA, _KEY, _VALUE = 13, 1, 2  # TensorProto.external_data, StringStringEntryProto
_NODE, _TENSOR, _GRAPH, _ATTRIBUTE, _SPARSE = "node", "tensor", "graph", "attribute", "sparse"
# Messages that lead to tensors: field number -> message.
_CHILDREN: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: _GRAPH, 20: "training", 25: "function"},
        "training": {1: _GRAPH, 2: _GRAPH},
        "function": {7: _NODE, 11: _ATTRIBUTE},
        _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
        _NODE: {5: _ATTRIBUTE},
        _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
        _SPARSE: {1: _TENSOR, 2: _TENSOR},
        _TENSOR: {},
    }
)


@dataclass(frozen=True)
class ExternalData:
    """One tensor's place in a data file, as the graph claims it."""

    location: str
    offset: int
    nbytes: int


def check_external_data(graph: Path, data: Path) -> None:
    """Make sure that all external weights of `graph` lie in `data`, a real file beside it, within its size.

    Raises:
        ModelFileError: they do not, or the graph is damaged.
    """
    folder = graph.parent.resolve()
    try:
        if graph.stat().st_size > MAX_GRAPH_NBYTES:
            raise ModelFileError(
                f"{graph}: has {graph.stat().st_size} bytes, too many for a graph; export it again"
            )
        content = graph.read_bytes()
        if data.resolve().parent != folder or not data.is_file():
            raise ModelFileError(f"{data}: is not a file in the model's own folder; copy it there")
        size = data.stat().st_size
    except OSError as error:
        raise ModelFileError(
            f"{error.filename}: cannot be read: {error.strerror}; export the model again"
        ) from None
    for tensor in external_tensors(content, graph):
        if tensor.location != data.name:
            raise ModelFileError(
                f"{graph}: a weight is said to be in {tensor.location!r}, which is not {data.name!r}; "
                "do not use this file, export the model again"
            )
        if tensor.offset + tensor.nbytes > size:
            raise ModelFileError(
                f"{data}: was cut short: a weight ends at byte {tensor.offset + tensor.nbytes} and the file has "
                f"{size}; copy or export it again"
            )


def external_tensors(content: bytes, path: Path) -> Iterator[ExternalData]:
    """Every tensor of a serialized ModelProto that keeps its values outside.

    Raises:
        ModelFileError: the bytes are no such message.
    """
    try:
        yield from _walk(memoryview(content), "model", MAX_DEPTH)
    except (IndexError, ValueError) as error:
        raise ModelFileError(f"{path}: is not a sound ONNX file ({error}); export the model again") from None


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[ExternalData]:
    if depth == 0:
        raise ValueError("nested too deeply")
    entries: dict[str, str] = {}
    children = _CHILDREN[kind]
    for field, value in _fields(message):
        if isinstance(value, int):
            continue
        if field in children:
            yield from _walk(value, children[field], depth - 1)
        elif kind == _TENSOR and field == _EXTERNAL_DATA:
            pair = {
                number: bytes(part).decode() for number, part in _fields(value) if not isinstance(part, int)
            }
            entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if entries:
        offset, nbytes = int(entries.get("offset", "0")), int(entries.get("length", "0"))
        if offset < 0 or nbytes < 0:
            raise ValueError("a weight lies at a negative place")
        yield ExternalData(entries.get("location", ""), offset, nbytes)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) pairs of one message: bytes as a view, numbers as they are or as 0."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > end - at:
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size] if wire == 2 else 0
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, next position); at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
