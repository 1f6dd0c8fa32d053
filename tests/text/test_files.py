"""Text files: what is read, and what is said where nothing can be."""

from __future__ import annotations

import hashlib
import lzma
import os
from pathlib import Path

import pytest

from edgekv.errors import InputError
from edgekv.text.files import documents, read_hashed_text, read_text

TEXT = "one\r\ntwo\rthree\n\n\ngrößer\n"


@pytest.fixture(params=["text.txt", "text.txt.xz"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    file = tmp_path / request.param
    file.write_bytes(lzma.compress(TEXT.encode()) if file.suffix == ".xz" else TEXT.encode())
    return file


def test_line_ends_become_newlines_as_in_pythons_text_mode(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(TEXT.encode())
    assert read_text(path) == (tmp_path / "plain").read_text(encoding="utf-8")
    assert read_text(path).startswith("one\ntwo\nthree\n")


def test_a_hashed_text_is_whole_and_hashed_as_stored(path: Path) -> None:
    assert read_hashed_text(path) == (TEXT, hashlib.sha256(path.read_bytes()).hexdigest())


def test_documents_keep_their_line_ends(path: Path) -> None:
    assert list(documents(path)) == ["one\r\ntwo\rthree", "größer\n"]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.xz"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / name, TEXT.replace("größer", "größer\ufeff").encode("utf-8-sig")
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    assert read_text(path) == "one\ntwo\nthree\n\n\ngrößer\ufeff\n"
    assert read_hashed_text(path)[0].startswith("one\r\n")
    assert next(documents(path)) == "one\r\ntwo\rthree"


@pytest.mark.parametrize("name", ["text.txt", "text.txt.xz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_tells_utf_16(encoding: str, name: str, tmp_path: Path) -> None:
    """Windows PowerShell's `>` writes it."""
    path, data = tmp_path / name, ("\ufeff" + TEXT).encode(encoding)
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    assert read_hashed_text(path)[0] == TEXT
    assert list(documents(path)) == ["one\r\ntwo\rthree", "größer\n"]


def test_a_pipe_is_read_once() -> None:
    """A shell's <(command): it cannot be opened again."""
    read, write = os.pipe()
    os.write(write, b"text")
    os.close(write)
    assert read_hashed_text(Path(f"/dev/fd/{read}"))[0] == "text"
    os.close(read)


@pytest.mark.parametrize("read", [read_text, read_hashed_text, lambda *args: list(documents(*args))])
@pytest.mark.parametrize("option", ["", "--text"])
def test_what_cannot_be_read_is_an_input_error(read: object, option: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(TEXT.encode() * 99)[:-20])
    (tmp_path / "plain.txt.xz").write_bytes(TEXT.encode())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    messages = {
        "latin.txt": r"is not text in UTF-8 or UTF-16 .*; convert it, e.g. with iconv",
        "cut.txt.xz": r"is damaged: .*; fetch it again",
        "plain.txt.xz": r"is damaged: .*; fetch it again",
        "empty.txt": r"is empty; give a file with text in it",
        "none.txt": r"No such file or directory; check the path",
        "folder": r"Is a directory; check the path",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=rf"^(cannot read )?{option} ?{tmp_path / name}:? {message}$"):
            read(tmp_path / name, option)


def test_a_file_of_blank_lines_holds_no_document(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n\n \n\n\n\n")
    with pytest.raises(InputError, match="is empty"):
        list(documents(tmp_path / "blank.txt"))
