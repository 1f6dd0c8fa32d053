"""Malformed and truncated GGUF files: refused with a remedy, never by a crash.

Oracles: llama.cpp's own GGUF reader (whatever passes here must pass there) and gguf-py's.
"""

from __future__ import annotations

import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.errors import ModelFileError
from edgekv.models.gguf.header import _Reader, kept_header, read_header
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.models.gguf.source import GGUFSource

U8, U32, F32, BOOL, STR, ARR, U64 = 0, 4, 6, 7, 8, 9, 10
F32_TENSOR, Q4_0_TENSOR = 0, 2


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, n: int, items: bytes) -> bytes:
    return pair(key, ARR, struct.pack("<IQ", kind, n) + items)


def info(name: str | bytes = "a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


def tokens(*names: str) -> bytes:
    return array("tokenizer.ggml.tokens", STR, len(names), b"".join(text(name) for name in names))


def file_of(
    pairs: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    version: int = 3,
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file, its counts overridable, its data padded to `alignment`."""
    n_tensors = len(infos) if n_tensors is None else n_tensors
    n_kv = len(pairs) if n_kv is None else n_kv
    head = magic + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


NAME = pair("general.name", STR, text("tiny"))
ROW = bytes(128)  # one tensor of 32 F32
SOUND: dict[str, bytes] = {
    "one tensor": file_of([NAME], [info()], ROW),
    "version 2": file_of([NAME], [info()], ROW, version=2),
    "no tensors": file_of([NAME], []),
    "no keys": file_of([], [info()], ROW),
    "two tensors": file_of([], [info("a", (3,)), info("b", (32,), offset=32)], bytes(32) + ROW),
    "quantized": file_of([], [info("a", (64, 2), Q4_0_TENSOR)], bytes(72)),
    "alignment 64": file_of(
        [pair("general.alignment", U32, struct.pack("<I", 64))], [info()], ROW, alignment=64
    ),
    "every scalar": file_of(
        [pair(f"k{kind}", kind, bytes(n)) for kind, n in zip(range(8), (1, 1, 2, 2, 4, 4, 4, 1), strict=True)]
        + [pair(f"k{kind}", kind, bytes(8)) for kind in (10, 11, 12)],
        [],
    ),
    "arrays": file_of([array("a", U8, 3, b"abc"), array("b", STR, 2, text("x") + text("")), tokens("a")], []),
    "empty array": file_of([array("a", STR, 0, b"")], []),
}

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "three bytes": (b"GGU", "not a GGUF"),
    "text": (b"<!DOCTYPE html><html>", "not a GGUF"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "old ggml": (file_of([NAME], [info()], ROW, magic=b"tjgg"), "not a GGUF"),
    "magic only": (b"GGUF", "cut short"),
    "half a header": (SOUND["one tensor"][:20], "cut short"),
    "version 0": (file_of([], [], version=0), "version 0"),
    "version 1": (file_of([], [], version=1), "version 1"),
    "version 4": (file_of([], [], version=4), "version 4"),
    "big endian": (file_of([], [], version=3 << 24), "big-endian"),
    "absurd tensor count": (file_of([], [], n_tensors=2**63), "promises"),
    "absurd key count": (file_of([], [], n_kv=2**40), "promises"),
    "one key too few": (file_of([NAME], [info()], ROW, n_kv=2), "the name of tensor 0 has 0 bytes"),
    "empty key": (file_of([pair("", U8, b"1")], []), "empty"),
    "key not utf-8": (file_of([pair(b"\xff\xfe", U8, b"1")], [], bytes(32)), "not UTF-8"),
    "key too long": (file_of([struct.pack("<Q", 2**62) + bytes(64)], []), "ends at byte"),
    "duplicate key": (file_of([NAME, NAME], []), "twice"),
    "unknown value type": (file_of([pair("k", 13, bytes(32))], []), "type 13"),
    "nested array": (file_of([array("k", ARR, 1, bytes(64))], []), "array of arrays"),
    "array of unknown type": (file_of([array("k", 99, 1, bytes(64))], []), "type 99"),
    "absurd array": (file_of([array("k", U64, 2**61, bytes(64))], []), "items"),
    "absurd string array": (file_of([array("k", STR, 2**61, bytes(64))], []), "items"),
    "array past the end": (file_of([array("k", U64, 99, bytes(64))], []), "inside the 99 items"),
    "string array past the end": (file_of([array("k", STR, 99, bytes(64))], []), "inside the 99 items"),
    "string value too long": (file_of([pair("k", STR, struct.pack("<Q", 2**64 - 1))], [], ROW), "ends at"),
    "string value not utf-8": (file_of([pair("k", STR, text(b"\xc3"))], [], bytes(32)), "not UTF-8"),
    "array item too long": (file_of([array("k", STR, 1, struct.pack("<Q", 999))], []), "item 0"),
    "array item not utf-8": (file_of([array("k", STR, 2, text("a") + text(b"\xff"))], []), "item 1"),
    "alignment 0": (file_of([pair("general.alignment", U32, bytes(4))], []), "power of two"),
    "alignment 12": (
        file_of([pair("general.alignment", U32, struct.pack("<I", 12))], []),
        "power of two",
    ),
    "alignment of wrong type": (
        file_of([pair("general.alignment", U64, struct.pack("<Q", 32))], []),
        "power of two",
    ),
    "tensor name empty": (file_of([], [info("")], ROW), "name of tensor 0"),
    "tensor name too long": (file_of([], [info("a" * 64)], ROW), "64 bytes"),
    "tensor name not utf-8": (file_of([], [info(b"\xff")], ROW), "not UTF-8"),
    "duplicate tensor": (file_of([], [info(), info(offset=128)], ROW * 2), "twice"),
    "no dimensions": (file_of([], [info(dims=())], bytes(160)), "0 dimensions"),
    "five dimensions": (file_of([], [info(dims=(1, 1, 1, 1, 1))], ROW), "5 dimensions"),
    "dimension 0": (file_of([], [info(dims=(32, 0))], ROW), "shape"),
    "dimension -1": (file_of([], [info(dims=(32, 2**64 - 1))], ROW), "shape"),
    "product past 2^63": (file_of([], [info(dims=(2**32, 2**31))], ROW), "shape"),
    "product wraps to 0": (file_of([], [info(dims=(2**32, 2**32))], ROW), "shape"),
    "more bytes than the file": (file_of([], [info(dims=(2**30,))], ROW), "ends at byte"),
    "retired tensor type": (file_of([], [info(kind=4)], ROW), "type 4"),
    "unknown tensor type": (file_of([], [info(kind=1000)], ROW), "type 1000"),
    "rows do not divide": (file_of([], [info(dims=(48,), kind=Q4_0_TENSOR)], ROW), "divide"),
    "offset unaligned": (file_of([], [info(offset=8)], ROW * 2), "expected"),
    "offset past the end": (file_of([], [info(offset=4096)], ROW), "expected"),
    "offset overflows": (file_of([], [info(offset=2**64 - 32)], ROW), "expected"),
    "overlap": (file_of([], [info("a"), info("b")], ROW * 2), "tensor b"),
    "gap": (file_of([], [info("a"), info("b", offset=160)], ROW * 3), "tensor b"),
    "data cut": (file_of([], [info()], ROW[:-1]), "ends at byte"),
    "no data": (file_of([], [info()]), "ends at byte"),
    "tokens of wrong type": (file_of([array("tokenizer.ggml.tokens", U8, 1, b"a")], []), "strings"),
    "duplicate token": (file_of([tokens("a", "b", "a")], []), "'a' occurs twice"),
    "token types too few": (
        file_of([tokens("a", "b"), array("tokenizer.ggml.token_type", U32, 1, bytes(4))], []),
        "token_type",
    ),
    "scores of wrong type": (
        file_of([tokens("a"), array("tokenizer.ggml.scores", STR, 1, text("1"))], []),
        "scores",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_pass_here_and_in_llama_cpp(
    tmp_path: Path, name: str, llama_accepts: Callable[[Path], bool]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND[name])
    read_header(path)
    assert llama_accepts(path)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    content, phrase = BAD[name]
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=phrase) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert ";" in message, "a remedy follows the problem"
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="is a folder"):
        read_header(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"make one: edgekv export gguf .*folder -o"):
        read_header(tmp_path / "folder")
    (tmp_path / "plain").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "plain" / "model.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(Path("a\0b"))
    with pytest.raises(ModelFileError, match="regular file"):
        read_header(Path("/dev/null"))


def test_nothing_is_allocated_by_a_count_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tracemalloc.start()
    try:
        for name in ("absurd array", "absurd string array", "absurd tensor count", "string value too long"):
            path.write_bytes(BAD[name][0])
            with pytest.raises(ModelFileError):
                read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_header_of_a_real_model_is_gguf_pys(smollm2: Path) -> None:
    header = read_header(smollm2)
    reader = gguf.GGUFReader(smollm2)
    assert header.version == 3
    assert header.metadata == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert [(t.name, t.ggml_type, t.dims, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]


def test_header_of_a_real_model_is_read_in_no_time(smollm2: Path) -> None:
    times = []
    for _ in range(3):
        start = time.process_time()
        read_header(smollm2)
        times.append(time.process_time() - start)
    assert min(times) < 0.3


def test_a_kept_header_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND["one tensor"])
    first = kept_header(path)
    assert kept_header(path) is first
    path.write_bytes(SOUND["two tensors"])
    assert first != kept_header(path) == read_header(path)
    path.unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        kept_header(path)


def test_eval_reads_the_header_once_and_its_engines_each_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []
    read = _Reader.header

    def counted(reader: _Reader) -> GGUFHeader:
        readers.append(reader)
        return read(reader)

    monkeypatch.setattr(_Reader, "header", counted)
    (tmp_path / "text.txt").write_text("one two three " * 200)
    args = ["eval", tiny_llama, "--text", tmp_path / "text.txt", "--window", "64", "--limit", "2", "-j", "1"]
    args += ["--cache-dir", tmp_path]
    assert CliRunner().invoke(cli, list(map(str, args)), catch_exceptions=False).exit_code == 0
    assert len(readers) == 1 + 2  # an engine tells the size of its cache, another runs the windows


def test_a_real_model_cut_anywhere_is_refused(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(smollm2, path)
    tensors = read_header(path).tensors
    size, data = path.stat().st_size, tensors[0].offset
    in_data = [size - 1, size - 3000, tensors[-2].offset, size // 2, tensors[3].offset + 1, data + 1, data]
    in_header = [data * i // 16 for i in range(16, 1, -1)] + [500, 100, 24, 23, 12, 4, 1, 0]
    for n in in_data + in_header:
        with path.open("r+b") as file:
            file.truncate(n)
        with pytest.raises(ModelFileError, match="download"):
            GGUFSource(path)
