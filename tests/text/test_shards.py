"""Text to tokens to batches."""

import lzma

import numpy as np
import pytest

from edgekv.errors import InputError
from edgekv.progress import ignore
from edgekv.source import LazySource
from edgekv.spec import ModelSpec
from edgekv.text.shards import (
    Shard,
    TokenStream,
    break_token,
    cache_folder,
    documents,
    load_shard,
    tokenize,
    write_tokens,
)

TEXT = "first\n\nstill first\n\n\nsecond\n\n\n\n\n\nthird, größer\n"


def source(vocab: int = 1000) -> LazySource:
    tokens = ["a", "<|endoftext|>", "b"]
    return LazySource(
        ModelSpec("llama", "m", (), 8, vocab, 64, 1e-5, True), {"tokenizer.ggml.tokens": tokens}
    )


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.xz"])
def test_documents_are_cut_at_three_newlines(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(lzma.compress(TEXT.encode()) if name.endswith("xz") else TEXT.encode())
    assert list(documents(path)) == ["first\n\nstill first", "second", "third, größer\n"]


def test_a_break_across_two_reads_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("ab\n\n\ncd\n\n\nef")
    for size in range(1, 8):
        monkeypatch.setattr("edgekv.text.files.READ_CHARS", size)
        assert list(documents(path)) == ["ab", "cd", "ef"], size


def test_unreadable_texts_are_input_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(InputError, match="not text in UTF-8"):
        list(documents(tmp_path / "latin.txt"))
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(TEXT.encode() * 99)[:-20])
    with pytest.raises(InputError, match="damaged"):
        list(documents(tmp_path / "cut.txt.xz"))
    with pytest.raises(InputError, match="does not exist"):
        load_shard(tmp_path / "none.txt", source(), letters, ignore)


def test_the_break_token_follows_each_document():
    assert break_token(source().metadata) == 1
    assert break_token({"tokenizer.ggml.eos_token_id": 7}) == 7
    assert list(tokenize(iter(["ab", "c"]), letters, 1, ignore)) == [[97, 98, 1], [99, 1]]


def test_a_text_is_tokenized_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "t.txt"
    path.write_text("ab\n\n\nc")
    shard = load_shard(path, source(), letters, ignore)
    assert shard.tokens.tolist() == [97, 98, 1, 99, 1]
    assert shard.tokens.dtype == np.uint16
    assert len(list(cache_folder().iterdir())) == 1

    def never(text: str) -> list[int]:
        raise AssertionError(text)

    again = load_shard(path, source(), never, ignore)
    assert again.tokens.tolist() == shard.tokens.tolist()
    assert again.sha256 == shard.sha256


@pytest.mark.parametrize("packed", [False, True])
def test_token_files_are_taken_as_they_are(tmp_path, packed):
    path = tmp_path / "t.npy"
    write_tokens(path, iter([[1, 2], [3]]), 70000)
    if packed:
        data, path = path.read_bytes(), tmp_path / "t.npy.xz"
        path.write_bytes(lzma.compress(data))
    shard = load_shard(path, source(), letters, ignore)
    assert shard.tokens.tolist() == [1, 2, 3]
    assert shard.tokens.dtype == np.uint32


def test_unsuitable_token_files_are_input_errors(tmp_path):
    cases = {
        "made for another model": np.array([5, 1000], np.uint16),
        "not one row": np.zeros((2, 2), np.uint16),
        "holds float64": np.zeros(4),
    }
    for message, array in cases.items():
        np.save(tmp_path / "t.npy", array)
        with pytest.raises(InputError, match=message):
            load_shard(tmp_path / "t.npy", source(), letters, ignore)
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY nonsense")
    with pytest.raises(InputError, match="not a token file"):
        load_shard(tmp_path / "t.npy", source(), letters, ignore)


def shards() -> list[Shard]:
    first, second = np.arange(107, dtype=np.uint16), np.arange(200, 263, dtype=np.uint16)
    return [Shard("a", "", first), Shard("b", "", second)]


def test_each_sequence_is_seen_once_before_any_is_seen_again():
    stream = TokenStream(shards(), 10, 4, seed=0)
    assert stream.n_sequences == 16
    epochs = [np.concatenate([stream.tokens(step) for step in range(e * 4, e * 4 + 4)]) for e in range(2)]
    starts = [*range(0, 100, 10), *range(200, 260, 10)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == starts
        assert (np.diff(epoch) == 1).all()
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    forward, backward = TokenStream(shards(), 10, 3, seed=4), TokenStream(shards(), 10, 3, seed=4)
    batches = [forward.tokens(step) for step in range(12)]
    for step in reversed(range(12)):  # batches straddle epochs: 16 is no multiple of 3
        np.testing.assert_array_equal(backward.tokens(step), batches[step])
    assert TokenStream(shards(), 10, 3, seed=5).tokens(0).tolist() != batches[0].tolist()


def test_held_out_sequences_are_never_trained_on():
    stream = TokenStream(shards(), 10, 2, seed=0, held_out=2)
    assert stream.held_out[:, 0].tolist() == [240, 250]
    seen = np.concatenate([stream.tokens(step) for step in range(14)])
    assert not np.isin(seen[:, 0], [240, 250]).any()


def test_too_little_text_is_an_input_error():
    with pytest.raises(InputError, match="16 sequences"):
        TokenStream(shards(), 10, 17, seed=0)
