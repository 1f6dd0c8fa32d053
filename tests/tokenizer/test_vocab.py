"""Special tokens, decoding, and vocabularies that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.gguf.header import read_header
from edgekv.tokenizer.bpe import BYTE_OF_LETTER
from edgekv.tokenizer.language import TokenStream
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.tokenizer.vocab import PackedTexts, TokenType, read_vocab, text_tokens

Comparison = Callable[[Path], Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ROLE_TEXTS = (
    *(
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
    ),
    *(
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
    ),
    *(
        "<|flush|>",
        "<|calls|>",
        "</s>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<|fim_prefix|>",
        "<PRE>",
    ),
    *("<|fim_suffix|>", "<fim_suffix>", "<MID>", "<|fim_middle|>", "<|fim_pad|>", "[PAD]", "<|fim_repo|>"),
    *(
        "<reponame>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|plamo:eos|>",
    ),
    *("<|im_start|>", "<unused1>", "▁<PRE>", "<｜fim▁hole｜>", "<|constrain|>"),
)


def random_vocab(write_vocab: Callable[..., Path], path: Path, rng: random.Random) -> Path:
    """Some of the texts that llama.cpp gives a role, with any type, keys or none; one text a role."""
    texts = rng.sample(ROLE_TEXTS, rng.randrange(1, 12))
    for family in (
        ("<PRE>", "<|fim_prefix|>", "▁<PRE>"),
        ("<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>"),
    ):
        texts = [t for t in texts if t not in family[1:]]
    for family in (
        ("<MID>", "<|fim_middle|>"),
        ("<|fim_pad|>", "[PAD]"),
        ("<|fim_repo|>", "<reponame>", "<|repo_name|>"),
    ):
        texts = [t for t in texts if t not in family[1:]]
    tokens = [*BYTE_OF_LETTER, "Ġt", "", "<0x41>", "", *texts]
    types = [NORMAL] * 258 + [BYTE, UNUSED] + [rng.choice((1, 1, 2, 3, 3, 4, 5)) for _ in texts]
    keys: dict[str, Any] = {
        f"{role}_token_id": rng.randrange(256, len(tokens) + 2)
        for role in ("bos", "eos", "eot", "eom", "fim_pad", "fim_sep", "prefix")
        if rng.random() < 0.3
    }
    return write_vocab(path, "gpt2", tokens, types, pre="gpt-2", merges=["Ġ t"], **keys)


def test_roles_and_pieces_of_random_vocabularies(
    tmp_path: Path, compared: Comparison, write_vocab: Callable[..., Path]
) -> None:
    rng = random.Random(9)
    for _ in range(150):
        path = random_vocab(write_vocab, tmp_path / "vocab.gguf", rng)
        with compared(path) as (tokenizer, vocab, check):
            assert_same_tokens(tokenizer, vocab)
            check(" ".join(ROLE_TEXTS))
            check(" ".join(ROLE_TEXTS), parse_special=True)


def assert_same_tokens(tokenizer: Tokenizer, vocab: Any) -> None:
    assert len(tokenizer) == vocab.size
    assert tokenizer.stop_ids == vocab.stop_ids()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (vocab.role("bos"), vocab.role("eos"))
    for token in range(vocab.size):
        piece = tokenizer.token_bytes(token)
        assert piece == vocab.piece(token, special=True)
        assert (b"" if tokenizer.is_control(token) else piece) == vocab.piece(token, special=False)


def test_smollm2_roles_and_pieces(smollm2: Path, compared: Comparison) -> None:
    with compared(smollm2) as (tokenizer, vocab, _):
        assert_same_tokens(tokenizer, vocab)
    assert (len(tokenizer), tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_decoding_gives_the_text_back(smollm2: Path, mixed_text: Callable[..., str]) -> None:
    metadata = read_header(smollm2).metadata
    tokenizer = Tokenizer.from_metadata(metadata)
    letters = read_vocab(metadata).ids
    missing = {byte for letter, byte in BYTE_OF_LETTER.items() if letter not in letters}
    text = "".join(c for c in mixed_text(300_000, seed=10) if not missing & set(c.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", parse_special=True)
    assert tokenizer.decode(ids) == "user\nHi"
    assert tokenizer.decode(ids, special=True) == "<|im_start|>user\nHi<|im_end|>"


def test_stream_gives_whole_characters_only(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    ids = tokenizer.encode("Zoë 🏳️‍🌈 你好 <|im_end|> x", parse_special=True)
    stream = TokenStream(tokenizer)
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts, "an emoji takes several tokens"
    assert stream.finish() == ""
    cut = tokenizer.encode("🏳")[:1]
    stream = TokenStream(tokenizer)
    assert stream.push(cut[0]) == ""
    assert stream.finish() == tokenizer.decode(cut) == "\ufffd"


def test_undecodable_input_becomes_replacement_characters(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    assert tokenizer.encode(b"a\xffb".decode(errors="surrogateescape")) == tokenizer.encode("a\ufffdb")


def test_vocabularies_that_cannot_be_used(tmp_path: Path) -> None:
    def build(**metadata: Any) -> Tokenizer:
        return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})

    letters = list(BYTE_OF_LETTER)
    with pytest.raises(UnsupportedError, match="'bert' is not supported"):
        build(model="bert", tokens=["a"])
    with pytest.raises(UnsupportedError, match="None is not supported"):
        build()
    with pytest.raises(UnsupportedError, match=r"'kimi-k2' is not supported; EdgeKV reads .*smollm"):
        build(model="gpt2", pre="kimi-k2", tokens=["a"])
    with pytest.raises(ModelFileError, match="no vocabulary"):
        build(model="gpt2", merges=[])
    with pytest.raises(ModelFileError, match="no merges"):
        build(model="gpt2", tokens=letters)
    with pytest.raises(ModelFileError, match="do not fit the vocabulary"):
        build(model="gpt2", tokens=letters, merges=["a b"])
    with pytest.raises(ModelFileError, match="'a' occurs twice"):
        build(model="llama", tokens=["a", "a"])
    with pytest.raises(ModelFileError, match="names none"):
        build(model="llama", tokens=["a"])
    with pytest.raises(ModelFileError, match="no byte tokens to spell 'x'"):
        build(model="llama", tokens=["a", "b", "c"], add_space_prefix=False).encode("x")
    with pytest.raises(IndexError, match="outside the vocabulary of 3"):
        build(model="llama", tokens=["a", "b", "c"]).token_bytes(3)


def test_packed_texts_are_the_texts() -> None:
    texts = ["", "a", "Ġthe", "🏳️‍🌈", "", "\udc80", "zoë"]
    packed = PackedTexts(texts)
    assert [packed[i] for i in range(len(packed))] == texts
    assert len(PackedTexts([])) == 0


def test_token_types_are_gguf_pys() -> None:
    assert {kind.name: kind.value for kind in TokenType} == {kind.name: kind.value for kind in gguf.TokenType}


def test_tokens_that_stand_for_text() -> None:
    assert text_tokens({"tokenizer.ggml.token_type": [3, 1, 6, 1]}, 4) == [1, 3]
    assert text_tokens({}, 3) == [0, 1, 2]


def test_keys_of_another_type_name_no_token() -> None:
    """Not the last token, as -1 would be of a list, and no error of Python's."""
    tokens = [*BYTE_OF_LETTER, "<|im_end|>"]
    pairs = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens}
    for wrong in (-1, 2.0, "256", [256], 10**6):
        assert read_vocab({**pairs, "tokenizer.ggml.eos_token_id": wrong}).stop_ids == {11, 256}
    with pytest.raises(UnsupportedError, match="pre-tokenizer"):
        Tokenizer.from_metadata({**pairs, "tokenizer.ggml.pre": ["smollm"]})
