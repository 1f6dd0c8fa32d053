"""Files of cached rows: flipped bits are found, a kill leaves the old file or the new one, nothing else is loaded."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.cache.blocks import NewBlock
from edgekv.cache.rows import CacheRows, Plane
from edgekv.cache.rows_file import (
    HEADER,
    NOTES,
    ROWS,
    TOKENS_PER_BLOCK,
    Header,
    Stored,
    append_rows,
    read_rows_file,
    write_rows_file,
)
from edgekv.documents import dumps, encode
from edgekv.errors import InputError, OutputError
from edgekv.models.identity import ModelIdentity

LAYOUT = (Plane("0.key", "q4_0", 32), Plane("0.value", "f16", 3))  # 18 and 6 bytes
HEAD = Header.of("edgekv.session", ModelIdentity("tiny", "00"), LAYOUT)


_BYTES = np.random.default_rng(0).integers(0, 256, (3000, 24), np.uint8)


def rows_of(tokens: list[int]) -> CacheRows:
    """Rows that depend on the token, so that a mix of two saves would show."""
    rows = CacheRows.empty(LAYOUT, len(tokens))
    for plane, columns in zip(rows.planes(), np.split(_BYTES[tokens], [18], axis=1), strict=True):
        plane[:] = columns
    return rows


def is_true(stored: Stored, tokens: list[int]) -> bool:
    """Whether what was read is a beginning of these tokens with their rows."""
    n = len(stored.tokens)
    return stored.tokens == tokens[:n] and bool((stored.rows().data == rows_of(tokens[:n]).data).all())


def saved_thrice(path: Path) -> list[tuple[list[int], dict[str, int]]]:
    """A file of three saves, the last of which takes back and replaces tokens; what each one held."""
    first = list(range(100, 140))
    second = first + list(range(300, 330))
    third = second[:50] + list(range(400, 420))
    end = write_rows_file(path, HEAD, first, rows_of(first), {"save": 1})
    end = append_rows(path, end, 40, second[40:], rows_of(second[40:]), {"save": 2})
    append_rows(path, end, 50, third[50:], rows_of(third[50:]), {"save": 3})
    return [(first, {"save": 1}), (second, {"save": 2}), (third, {"save": 3})]


def test_the_last_save_is_what_is_read(tmp_path: Path) -> None:
    saves = saved_thrice(tmp_path / "s")
    stored = read_rows_file(tmp_path / "s", "edgekv.session")
    assert (stored.tokens, stored.notes) == saves[-1]
    assert is_true(stored, saves[-1][0])
    assert (stored.header, stored.damage, stored.end) == (HEAD, "", (tmp_path / "s").stat().st_size)
    append_rows(tmp_path / "s", stored.end, 10, [], CacheRows.empty(LAYOUT, 0), {"save": 4})
    stored = read_rows_file(tmp_path / "s", "edgekv.session")
    assert (stored.tokens, stored.notes) == (saves[0][0][:10], {"save": 4})


def test_many_tokens_take_several_blocks(tmp_path: Path) -> None:
    tokens = list(range(2 * TOKENS_PER_BLOCK + 7))
    write_rows_file(tmp_path / "s", HEAD, tokens, rows_of(tokens), {})
    stored = read_rows_file(tmp_path / "s", "edgekv.session")
    assert len(stored.tokens) == len(tokens)
    assert is_true(stored, tokens)
    with pytest.raises(OutputError, match="exists; pass --force"):
        write_rows_file(tmp_path / "s", HEAD, tokens, rows_of(tokens), {}, force=False)


def read_or_refusal(path: Path) -> tuple[str, Stored | None]:
    try:
        return "", read_rows_file(path, "edgekv.session")
    except InputError as error:
        return str(error), None


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    saves = saved_thrice(path)
    sound = path.read_bytes()
    random = np.random.default_rng(1)
    n_salvaged = 0
    for place in random.integers(0, 8 * len(sound), 1000):
        flipped = bytearray(sound)
        flipped[place // 8] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        refusal, stored = read_or_refusal(path)
        if stored is None:
            assert "damaged" in refusal or "no session of EdgeKV" in refusal
            continue
        assert stored.damage
        assert stored.end is None
        assert stored.notes in [notes for _, notes in saves]
        assert any(is_true(stored, tokens) for tokens, _ in saves)
        n_salvaged += stored.notes == saves[-1][1]
    assert n_salvaged > 500  # a flip in the rows costs no notes


def test_a_file_cut_short_is_an_earlier_save(tmp_path: Path) -> None:
    path = tmp_path / "s"
    saves = saved_thrice(path)
    whole = path.read_bytes()
    found = []
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        try:
            stored = read_rows_file(path, "edgekv.session")
        except InputError:
            continue
        assert (stored.tokens, stored.notes) in saves[:2]
        assert is_true(stored, stored.tokens)
        found.append(stored.notes["save"])
        end = stored.end
        assert end is not None
        assert (stored.damage == "") == (size == end)
        if size % 100 == 0:  # the next save goes on from there
            append_rows(path, end, len(stored.tokens), [7], rows_of([7]), {"save": 9})
            assert read_rows_file(path, "edgekv.session").tokens == [*stored.tokens, 7]
    assert set(found) == {1, 2}


@pytest.mark.parametrize("anew", [False, True])
def test_a_kill_while_saving_leaves_the_old_save_or_the_new_one(tmp_path: Path, anew: bool) -> None:
    path = tmp_path / "s"
    tokens = list(range(3000))
    many = rows_of(tokens)
    random = np.random.default_rng(2)
    write_rows_file(path, HEAD, tokens, many, {"save": 0})
    for _ in range(50):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save = 0
            end = write_rows_file(path, HEAD, tokens, many, {"save": save})
            while True:
                os.write(writer, struct.pack("<i", save))
                save += 1
                if anew:
                    end = write_rows_file(path, HEAD, [save, *tokens[1:]], many, {"save": save})
                else:
                    end = append_rows(path, end, 0, [save, *tokens[1:]], many, {"save": save})
        os.close(writer)
        done = os.read(reader, 4)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            done += pipe.read()
        last = struct.unpack("<i", done[-4:])[0]
        stored = read_rows_file(path, "edgekv.session")
        assert stored.notes["save"] in (last, last + 1)
        assert stored.tokens == [stored.notes["save"], *tokens[1:]]
        assert (stored.rows().data == many.data).all()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    saves = saved_thrice(path)
    sound = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; it is as it was before, free some space"):
        append_rows(path, len(sound), 70, [1], rows_of([1]), {"save": 4})
    assert path.read_bytes() == sound
    with pytest.raises(OutputError, match="No space left"):
        write_rows_file(path, HEAD, [1], rows_of([1]), {"save": 4})
    assert path.read_bytes() == sound
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert read_rows_file(path, "edgekv.session").notes == saves[-1][1]


# Files that somebody else made


def blocks(*given: tuple[int, tuple[int, int], bytes]) -> Callable[[Path], None]:
    """Writes a file of blocks with right checksums, whatever is in them."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for kind, numbers, payload in given:
                NewBlock(kind, numbers, [np.frombuffer(payload, np.uint8)]).write(file)

    return write


def json(value: Any) -> bytes:
    return dumps(value).encode()


HEAD_BLOCK = (HEADER, (0, 0), json(HEAD))
END_BLOCK = (NOTES, (5, 0), b"{}")
FIVE = np.arange(5, dtype="<i4").tobytes() + bytes(5 * 24)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "no session of EdgeKV"),
        (lambda path: path.write_bytes(b"GGUF" * 100), "no session of EdgeKV"),
        (blocks((ROWS, (0, 5), FIVE)), "header is damaged"),
        (blocks(HEAD_BLOCK), "no save in it is whole"),
        (blocks((HEADER, (0, 0), b"[]"), END_BLOCK), "header is damaged"),
        (blocks((HEADER, (0, 0), b"[" * 100_000), END_BLOCK), "header is damaged"),
        (
            blocks((HEADER, (0, 0), json(encode(HEAD) | {"version": 2})), END_BLOCK),
            "is of version 2, and this",
        ),
        (
            blocks((HEADER, (0, 0), json(encode(HEAD) | {"format": "edgekv.pack"})), END_BLOCK),
            "name a session",
        ),
        (blocks((HEADER, (0, 0), json(encode(HEAD) | {"extra": 1})), END_BLOCK), "extra: unknown key"),
        (blocks((HEADER, (0, 0), json(HEAD).replace(b'"q4_0"', b'"q9_9"')), END_BLOCK), "header is damaged"),
        (blocks((HEADER, (0, 0), json(HEAD).replace(b"32", b"33")), END_BLOCK), "header is damaged"),
        (blocks((HEADER, (0, 0), json(HEAD).replace(b"32", b"-32")), END_BLOCK), "header is damaged"),
        (blocks(HEAD_BLOCK, (NOTES, (0, 0), b"{")), "no save in it is whole"),
    ],
)
def test_what_is_no_session_is_refused(write: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(InputError, match=words) as caught:
        read_rows_file(tmp_path / "s", "edgekv.session")
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ((ROWS, (0, 5), FIVE[:-1]), "hold 139 bytes for 5 tokens, which take 140"),
        ((ROWS, (0, 5), FIVE + b"\0"), "hold 141 bytes"),
        ((ROWS, (1, 5), FIVE), "hold rows of tokens 1 to 6, which cannot be"),
        ((ROWS, (0, 0), b""), "cannot be"),
        ((ROWS, (0, 2**32 - 1), FIVE), "cannot be"),
        ((77, (0, 5), FIVE), "do not fit"),
    ],
)
def test_rows_of_other_sizes_are_not_loaded(
    block: tuple[int, tuple[int, int], bytes], words: str, tmp_path: Path
) -> None:
    blocks(HEAD_BLOCK, block, END_BLOCK)(tmp_path / "s")
    stored = read_rows_file(tmp_path / "s", "edgekv.session")
    assert words in stored.damage
    assert stored.tokens == []
    assert stored.rows().n_tokens == 0
    assert stored.notes == {}
