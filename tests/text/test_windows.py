"""Calibration windows: pieces of the text's own tokens, shared out over files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import InputError
from edgekv.models.open import open_model
from edgekv.source import LazySource
from edgekv.text.windows import OTHER_KINDS, OTHER_TOKENS, WINDOW, windows_from_files, windows_of_other_kinds
from edgekv.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(make_llama: Callable[..., LazySource]) -> Tokenizer:
    """One token per byte, but for "ab"."""
    return Tokenizer.from_metadata(make_llama().metadata)


def letters(path: Path, n: int, alphabet: str) -> Path:
    """A text of n letters."""
    path.write_text("".join(np.random.default_rng(n).choice(list(alphabet), n)))
    return path


def test_a_short_text_is_cut_into_windows_in_another_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = letters(tmp_path / "t.txt", 5 * WINDOW + 7, "cdefgh")
    tokens = tokenizer.encode(path.read_text())
    expected = [tokens[i : i + WINDOW] for i in range(0, 5 * WINDOW, WINDOW)]
    found = windows_from_files([path], tokenizer, 10**6, seed=0)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == sorted(expected)
    assert found.tolist() != expected
    np.testing.assert_array_equal(windows_from_files([path], tokenizer, 10**6, seed=0), found)


def test_each_file_gives_its_share_and_no_more_is_taken_than_asked_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    paths = [letters(tmp_path / "low.txt", 9000, "cdef"), letters(tmp_path / "high.txt", 9000, "wxyz")]
    low = set(tokenizer.encode("cdef"))
    for n_tokens, shares in ((6 * WINDOW, [3, 3]), (5 * WINDOW + 100, [3, 2]), (1, [1, 0])):
        found = windows_from_files(paths, tokenizer, n_tokens, seed=0)
        from_low = [set(row.tolist()) <= low for row in found]
        assert [from_low.count(True), from_low.count(False)] == shares


def test_a_long_text_is_sampled_all_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Pieces of 8 * WINDOW characters: every window lies in the text, and most are not from its beginning."""
    path = letters(tmp_path / "t.txt", 400 * WINDOW, "cdefgh")
    tokens = np.asarray(tokenizer.encode(path.read_text()))
    found = windows_from_files([path], tokenizer, 4 * WINDOW, seed=3)
    starts = []
    for row in found:
        (start,) = np.flatnonzero(
            (np.lib.stride_tricks.sliding_window_view(tokens, 16) == row[:16]).all(axis=1)
        )
        np.testing.assert_array_equal(tokens[start : start + WINDOW], row)
        starts.append(start)
    assert max(starts) > 40 * WINDOW


def test_line_ends_of_other_systems_change_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = letters(tmp_path / "t.txt", 3000, "cdefgh\n").read_text()
    (tmp_path / "dos.txt").write_bytes(lines.replace("\n", "\r\n").encode())
    found = [windows_from_files([tmp_path / name], tokenizer, 2048, 0) for name in ("t.txt", "dos.txt")]
    np.testing.assert_array_equal(*found)


def test_too_little_text_is_an_input_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=f"shorter than one window of {WINDOW} tokens"):
        windows_from_files([letters(tmp_path / "t.txt", WINDOW - 1, "cd")], tokenizer, 4096, 0)
    with pytest.raises(InputError, match=r"cannot read --text .*none\.txt"):
        windows_from_files([tmp_path / "none.txt"], tokenizer, 4096, 0)


def test_other_kinds_are_windows_of_the_text_that_ships(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(OTHER_KINDS.read_text(encoding="utf-8"))
    found = windows_of_other_kinds(tokenizer, 512)
    assert found is not None
    assert found.size == OTHER_TOKENS
    assert found.reshape(-1).tolist() == tokens[:OTHER_TOKENS]
    assert windows_of_other_kinds(tokenizer, len(tokens) + 1) is None


def test_other_kinds_fill_the_windows_of_a_real_vocabulary(smollm2: Path) -> None:
    """And most of it is text that a language model knows: words, not letters."""
    ids = Tokenizer.from_metadata(open_model(smollm2).metadata).encode(
        OTHER_KINDS.read_text(encoding="utf-8")
    )
    assert OTHER_TOKENS <= len(ids) < OTHER_TOKENS * 1.5
