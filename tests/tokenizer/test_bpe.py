"""Token for token what llama.cpp makes of a megabyte of everything.

Real vocabulary: SmolLM2's. For every other pre-tokenizer a vocabulary made to show where words were cut: it
merges nearly any two neighbouring bytes, so a cut in the wrong place changes the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import models

from edgekv.errors import ModelFileError
from edgekv.tokenizer.bpe import BYTE_OF_LETTER, SPACE, Merges
from edgekv.tokenizer.pre_tokenize import PRE_TYPES

Comparison = Callable[[Path], Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@cache
def revealing_merges() -> list[str]:
    """Merges of two bytes: any with common ASCII, and the last byte of a character with the first of another."""
    letter = {byte: name for name, byte in BYTE_OF_LETTER.items()}
    common = [letter[byte] for byte in b" aAsS1'\n\r\t./<,"]
    pairs = {(a, letter[b]) for a in common for b in range(256)} | {
        (letter[a], b) for a in range(256) for b in common
    }
    pairs |= {(letter[a], letter[b]) for a in range(0x80, 0xC0) for b in range(0xC2, 0xF5)}
    merges = sorted(f"{a} {b}" for a, b in pairs)
    random.Random(3).shuffle(merges)
    return merges


def write_byte_level(
    write_vocab: Callable[..., Path],
    path: Path,
    pre: str,
    without: str = "",
    n_merges: int | None = None,
    **keys: Any,
) -> Path:
    """A byte-level vocabulary of `revealing_merges`, of which the letters in `without` are missing."""
    merges = [merge for merge in revealing_merges()[:n_merges] if not set(merge) & set(without)]
    plain = [letter for letter in BYTE_OF_LETTER if letter not in without]
    plain += [merge.replace(" ", "") for merge in merges] + ["hello", "Ġworld", "Ġ1st", "don't"]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|><|im_end|>"]
    tokens = plain + special + ["<empty_output>", "<unk>"]
    types = [NORMAL] * len(plain) + [CONTROL] * len(special) + [USER_DEFINED, UNKNOWN]
    bos = tokens.index("<|im_start|>")
    return write_vocab(path, "gpt2", tokens, types, pre=pre, merges=merges, bos_token_id=bos, **keys)


def test_smollm2_on_a_megabyte_of_mixed_text(
    smollm2: Path, mixed_text: Callable[..., str], compared: Comparison
) -> None:
    text = mixed_text(1_000_000)
    assert len(text.encode()) >= 1_000_000
    with compared(smollm2) as (_, _, check):
        plain = check(text, add_special=True)
        special = check(text, add_special=True, parse_special=True)
    assert plain > special > 300_000


def test_smollm2_on_edges(smollm2: Path, characters: str, compared: Comparison) -> None:
    texts = (
        "",
        " ",
        "\n",
        "\0",
        "<|im_end|>",
        " <|im_end|> ",
        "<|im_start|>user\nhi",
        "é",
        "\U0010ffff",
        "a" * 5000,
    )
    with compared(smollm2) as (_, _, check):
        for text in (*texts, characters):
            check(text)
            check(text, add_special=True, parse_special=True)


@pytest.mark.parametrize("pre", {kind: name for name, kind in reversed(PRE_TYPES.items())}.values())
def test_every_kind_of_pre_tokenizer_cuts_as_llama_cpp_does(
    tmp_path: Path,
    pre: str,
    mixed_text: Callable[..., str],
    characters: str,
    compared: Comparison,
    write_vocab: Callable[..., Path],
) -> None:
    with compared(write_byte_level(write_vocab, tmp_path / "vocab.gguf", pre)) as (_, _, check):
        check(mixed_text(60_000, seed=4) + characters, add_special=True, parse_special=True)


def test_every_name_of_a_pre_tokenizer_is_llama_cpps(
    tmp_path: Path, mixed_text: Callable[..., str], compared: Comparison, write_vocab: Callable[..., Path]
) -> None:
    """Same cuts, same default of the beginning-of-text token, same use of whole words."""
    text = "hello world don't 1st  hello\n\n 12345 1st, fooBar()\r\n " + mixed_text(2_000, seed=5)
    for pre in PRE_TYPES:
        with compared(write_byte_level(write_vocab, tmp_path / "vocab.gguf", pre, n_merges=500)) as (
            _,
            _,
            check,
        ):
            check(text, add_special=True, parse_special=True)


def test_a_missing_byte_vanishes_and_keeps_its_neighbours_apart(
    tmp_path: Path, mixed_text: Callable[..., str], compared: Comparison, write_vocab: Callable[..., Path]
) -> None:
    path = write_byte_level(
        write_vocab, tmp_path / "vocab.gguf", "gpt-2", without="b\u0104ñ"
    )  # b, byte 4, byte 0xF1
    with compared(path) as (_, _, check):
        check("abs a\x04s 1b1 " + mixed_text(20_000, seed=6))


@pytest.mark.parametrize(
    "changes", [{"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": False}]
)
@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_added_tokens_follow_the_keys(
    tmp_path: Path, pre: str, changes: dict[str, bool], compared: Comparison, write_vocab: Callable[..., Path]
) -> None:
    path = write_byte_level(
        write_vocab, tmp_path / "vocab.gguf", pre, n_merges=500, eos_token_id=5, **changes
    )
    with compared(path) as (_, _, check):
        assert check("", add_special=True) == 1
        check("hello", add_special=True)
        check("hello")


def sentence_pieces(mixed_text: Callable[..., str]) -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores as SentencePiece makes them: bytes, pieces by frequency, ties, user tokens."""
    text = mixed_text(150_000, seed=7).replace(" ", SPACE)
    counts: dict[str, int] = {}
    for n in (1, 2, 3, 4, 5, 8):
        for i in range(0, len(text) - n, 3):
            counts[text[i : i + n]] = counts.get(text[i : i + n], 0) + n
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))[:6000]
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<|user|>",
        "<0x0A><0x0A>",
        SPACE * 5,
        "<|end|>",
        "\n\n\n",
        "<|endoftext|>",
    ]
    pieces = [piece for piece in pieces if "\0" not in piece and piece not in special]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL] + [USER_DEFINED] * 5 + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * (len(special) + 256) + [-float(i // 3) for i in range(len(pieces))]
    return tokens, types, scores


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Phi-3-mini"])
def test_sentencepiece_is_llama_cpps(
    tmp_path: Path,
    prefix: bool,
    name: str,
    mixed_text: Callable[..., str],
    compared: Comparison,
    write_vocab: Callable[..., Path],
) -> None:
    tokens, types, scores = sentence_pieces(mixed_text)
    path = write_vocab(
        tmp_path / "vocab.gguf", "llama", tokens, types, scores=scores, add_space_prefix=prefix, name=name
    )
    text = "Hello <s> there<|user|>\n \t<|end|>  a</s>\n\n\n\n" + mixed_text(100_000, seed=8)
    with compared(path) as (tokenizer, _, check):
        for parse_special in (False, True):
            check(text, parse_special=parse_special, add_special=True)
        check("")
        check(" leading")
        plain = " Hello  there, été 你好 👋\n  x"
        assert tokenizer.decode(tokenizer.encode(plain)) == plain


def test_merges_are_those_of_tokenizers() -> None:
    """Random merges, on words long enough that their order matters; Hugging Face's BPE is the oracle."""
    random_ = random.Random(3)
    texts = list("abcd")
    pairs: list[tuple[str, str]] = []
    while len(texts) < 120:
        pair = (random_.choice(texts), random_.choice(texts))
        if "".join(pair) not in texts and len("".join(pair)) < 9:
            texts.append("".join(pair))
            pairs.append(pair)
    ids = {text: i for i, text in enumerate(texts)}
    theirs = models.BPE(vocab=ids, merges=pairs)
    ours = Merges(ids, [" ".join(pair) for pair in pairs])
    for length in (0, 1, 2, *random_.choices(range(3, 400), k=60)):
        word = "".join(random_.choices("abcd", k=length))
        expected = tuple(token.id for token in theirs.tokenize(word))
        assert ours.apply([ids[letter] for letter in word]) == expected


def test_a_merge_of_no_token_is_told() -> None:
    with pytest.raises(ModelFileError, match="no token 'ab'"):
        Merges({"a": 0, "b": 1}, ["a b"])
