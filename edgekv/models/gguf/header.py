"""GGUF headers, read with the standard library and checked before any native code sees the file.

A model file is untrusted input, and native readers have had their share of overflows (CVE-2024-21802,
-21825, -21836, -23496, -23605, CVE-2025-53630, CVE-2026-27940, CVE-2026-33298). So nothing here allocates
by a count from the file that the file's own size does not cover, and whatever passes is a file that
llama.cpp's reader accepts (ggml/src/gguf.cpp, gguf_init_from_reader), with two limits more: tensors are
not empty, and a vocabulary has no duplicate, on which llama.cpp would abort the process.

Layout (ggml docs/gguf.md), little endian: magic, version u32, n_tensors u64, n_kv u64, the key-value
pairs, the tensor infos, padding, the tensors one after another, each padded to `general.alignment`.
"""

from __future__ import annotations

import mmap
import shlex
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType

from edgekv.errors import ModelFileError
from edgekv.models.gguf.layout import ARRAY, SCALARS, STRING, GGUFHeader, TensorInfo
from edgekv.quant.formats import BY_GGML_ID
from edgekv.spec import MetaValue
from edgekv.tokenizer.vocab import check_vocabulary

DEFAULT_ALIGNMENT = 32
UINT32 = 4  # GGUF's value type of `general.alignment`
MAX_NAME = 64  # GGML_MAX_NAME: bytes of a tensor name and its terminating zero
MAX_DIMS = 4
MAX_ITEMS = 2**24  # of one array; the largest vocabularies hold 2**18
MIN_KV_NBYTES = 8 + 1 + 4 + 1  # key length, a letter, type, the smallest value
MIN_TENSOR_NBYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, a letter, n_dims, one dim, type, offset


def read_header(path: Path) -> GGUFHeader:
    """Read and check a GGUF file's header: 50 ms for a vocabulary of 49,152 tokens.

    Raises:
        ModelFileError: the file is not a sound GGUF, or it cannot be read.
    """
    try:
        if (path / "config.json").is_file():
            raise ModelFileError(
                f"{path}: is a model folder, and llama.cpp runs GGUF; make one: "
                f"edgekv export gguf {shlex.quote(str(path))} -o MODEL.gguf"
            )
        if path.is_dir():
            raise ModelFileError(f"{path}: is a folder; name the .gguf file inside it")
        if path.exists() and not path.is_file():
            raise ModelFileError(f"{path}: is not a regular file; copy the model to a file first")
        with path.open("rb") as file:
            start = file.read(24)
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except FileNotFoundError:
        raise ModelFileError(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte, a file emptied meanwhile
        raise ModelFileError(f"{path}: cannot be read: {error}; check the path and its permissions") from None


def kept_header(path: Path) -> GGUFHeader:
    """`read_header` for code that asks one file several things: of the last two files, what it gave is kept.

    An engine, which hands the file to native code, reads and checks it itself; `edgekv chat` keeps none of these
    10 MB (49,152 tokens).
    """
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return read_header(path)  # which says what is wrong
    return _kept(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _kept(path: Path, size: int, mtime_ns: int) -> GGUFHeader:
    return read_header(path)


def _check_start(path: Path, start: bytes) -> None:
    """Magic and version, with a hint for what people most often have instead of a model."""
    if not start:
        raise ModelFileError(f"{path}: the file is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path}: is a Git LFS pointer, not the model; run `git lfs pull` beside it")
    if start[:4] != b"GGUF":
        raise ModelFileError(
            f"{path}: is not a GGUF file (it starts with {start[:4]!r}); download a .gguf of the model, "
            "or make one with llama.cpp's convert_hf_to_gguf.py"
        )
    if len(start) < 24:
        raise ModelFileError(
            f"{path}: was cut short at byte {len(start)}, inside the header; download it again"
        )
    version = int.from_bytes(start[4:8], "little")
    if version and version & 0xFFFF == 0:
        raise ModelFileError(f"{path}: is a big-endian GGUF; download or export the little-endian one")
    if version not in (2, 3):
        raise ModelFileError(
            f"{path}: is GGUF version {version}, EdgeKV reads 2 and 3; convert it with a current llama.cpp"
        )


class _Reader:
    """A position in the mapped file, and the checks on everything read from there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.end = len(data)
        self.pos = 0

    def header(self) -> GGUFHeader:
        self.pos = 4
        version, n_tensors, n_kv = self.numbers("<IQQ", "the header")
        for count, least, what in (
            (n_kv, MIN_KV_NBYTES, "key-value pairs"),
            (n_tensors, MIN_TENSOR_NBYTES, "tensors"),
        ):
            if count * least > self.end - self.pos:
                raise self.damaged(f"the header promises {count} {what}, more than {self.end} bytes can hold")
        metadata, alignment = self.metadata(n_kv)
        try:
            check_vocabulary(metadata)
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from None
        infos = [self.tensor_info(i) for i in range(n_tensors)]
        return GGUFHeader(version, MappingProxyType(metadata), self.lay_out(infos, alignment))

    def metadata(self, n_kv: int) -> tuple[dict[str, MetaValue], int]:
        """The key-value pairs, and the alignment they set."""
        metadata: dict[str, MetaValue] = {}
        alignment = DEFAULT_ALIGNMENT
        for i in range(n_kv):
            key = self.string(f"key {i}")
            if not key:
                raise self.damaged(f"key {i} is empty")
            if key in metadata:
                raise self.damaged(f"key {key!r} occurs twice")
            (kind,) = self.numbers("<I", f"the type of key {key!r}")
            value = self.value(kind, key)
            metadata[key] = value
            if key == "general.alignment":
                if kind != UINT32 or not isinstance(value, int) or value.bit_count() != 1:
                    raise self.damaged(
                        f"general.alignment is {value!r}, an unsigned power of two was expected"
                    )
                alignment = value
        return metadata, alignment

    def value(self, kind: int, key: str) -> MetaValue:
        if kind == STRING:
            return self.string(f"the value of key {key!r}")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.damaged(f"key {key!r} has type {kind}, which GGUF does not define")
        value: int | float | bool = self.numbers("<" + SCALARS[kind], f"the value of key {key!r}")[0]
        return value

    def array(self, key: str) -> MetaValue:
        kind, n = self.numbers("<IQ", f"the array {key!r}")
        if kind != STRING and kind not in SCALARS:
            what = "arrays" if kind == ARRAY else f"type {kind}"
            raise self.damaged(f"key {key!r} is an array of {what}, which no reader knows")
        least = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
        if n > MAX_ITEMS:
            raise self.damaged(f"key {key!r} has {n} items, more than the {MAX_ITEMS} that any model needs")
        if n * least > self.end - self.pos:
            raise self.cut_short(f"the {n} items of key {key!r}")
        if kind == STRING:
            return self.strings(n, key)
        return list(self.numbers(f"<{n}{SCALARS[kind]}", f"the array {key!r}"))

    def strings(self, n: int, key: str) -> list[str]:
        """`n` strings; written flat, since vocabulary and merges are 100,000 and more."""
        data, end, pos = self.data, self.end, self.pos
        unpack = struct.Struct("<Q").unpack_from
        items: list[str] = []
        try:
            for _ in range(n):
                stop = pos + 8 + unpack(data, pos)[0]
                if stop > end:
                    raise self.cut_short(f"item {len(items)} of {key!r}")
                items.append(data[pos + 8 : stop].decode())
                pos = stop
        except struct.error:
            raise self.cut_short(f"item {len(items)} of {key!r}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"item {len(items)} of {key!r} is not UTF-8") from None
        self.pos = pos
        return items

    def string(self, what: str) -> str:
        (length,) = self.numbers("<Q", f"the length of {what}")
        if length > self.end - self.pos:
            raise self.cut_short(what, f" of {length} bytes")
        text = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def tensor_info(self, i: int) -> tuple[str, int, tuple[int, ...], int]:
        """Name, ggml type, dims and data offset of tensor `i`."""
        name = self.string(f"the name of tensor {i}")
        if not 0 < len(name.encode()) < MAX_NAME:
            raise self.damaged(
                f"the name of tensor {i} has {len(name.encode())} bytes, not 1 to {MAX_NAME - 1}"
            )
        (n_dims,) = self.numbers("<I", f"tensor {name}")
        if not 0 < n_dims <= MAX_DIMS:
            raise self.damaged(f"tensor {name} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
        dims = self.numbers(f"<{n_dims}Q", f"the shape of tensor {name}")
        if 0 in dims or prod(dims) >= 2**63:
            raise self.damaged(f"tensor {name} has the impossible shape {dims}")
        kind, offset = self.numbers("<IQ", f"tensor {name}")
        if kind not in BY_GGML_ID:
            raise self.damaged(
                f"tensor {name} has ggml type {kind}, which is unknown or retired", "quantize the model anew"
            )
        if dims[0] % BY_GGML_ID[kind].block:
            kept = BY_GGML_ID[kind].name.upper()
            raise self.damaged(f"tensor {name}: rows of {dims[0]} do not divide into {kept} blocks")
        return name, kind, dims, offset

    def lay_out(
        self, infos: list[tuple[str, int, tuple[int, ...], int]], alignment: int
    ) -> tuple[TensorInfo, ...]:
        """Check that the data follow each other without gap or overlap, as llama.cpp wants."""
        start = _pad(self.pos, alignment)
        expected = 0
        tensors: dict[str, TensorInfo] = {}
        for name, kind, dims, offset in infos:
            nbytes = BY_GGML_ID[kind].nbytes(prod(dims))
            if name in tensors:
                raise self.damaged(f"tensor {name} occurs twice")
            if offset != expected:
                raise self.damaged(
                    f"tensor {name} starts at byte {offset} of the data, {expected} was expected"
                )
            if start + offset + nbytes > self.end:
                raise self.cut_short(f"tensor {name}", f" (it ends at byte {start + offset + nbytes})")
            tensors[name] = TensorInfo(name, BY_GGML_ID[kind].name.upper(), dims, start + offset, nbytes)
            expected = _pad(offset + nbytes, alignment)
        return tuple(tensors.values())

    def numbers(self, layout: str, what: str) -> tuple[int, ...]:
        """Fixed-size fields; typed as integers, which all but the floats of `value` and `array` are."""
        nbytes = struct.calcsize(layout)
        if nbytes > self.end - self.pos:
            raise self.cut_short(what)
        fields = struct.unpack_from(layout, self.data, self.pos)
        self.pos += nbytes
        return fields

    def cut_short(self, what: str, detail: str = "") -> ModelFileError:
        return self.damaged(f"the file ends at byte {self.end}, inside {what}{detail}", "download it again")

    def damaged(self, problem: str, remedy: str = "download or export the file again") -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}; {remedy}")


def _pad(n: int, alignment: int) -> int:
    return (n + alignment - 1) // alignment * alignment
