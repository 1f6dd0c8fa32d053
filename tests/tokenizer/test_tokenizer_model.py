"""Folders with SentencePiece's own tokenizer.model: the library's tokens, EdgeKV's and llama.cpp's are the same."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.models.hf.tokenizer_json import read_tokenizer
from edgekv.tokenizer.tokenizer import Tokenizer

Comparison = Callable[[Path], Any]
N_PIECES = 900
USER_DEFINED = ["\n\n", "▁▁▁▁", "<tool>"]


@pytest.fixture
def train(
    tmp_path: Path, mixed_text: Callable[..., str]
) -> Callable[..., sentencepiece.SentencePieceProcessor]:
    """Trains a tokenizer.model as Llama's was, but for `options`, and gives its processor."""

    def make(**options: Any) -> sentencepiece.SentencePieceProcessor:
        settings = {
            "vocab_size": N_PIECES,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "character_coverage": 0.98,
            "split_digits": True,
            "minloglevel": 2,
        }
        written = io.BytesIO()
        lines = mixed_text(150_000, seed=11).replace("\0", "").split("\n")
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=written, **(settings | options)
        )
        (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
        return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())

    return make


def configure(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options", [{}, {"add_dummy_prefix": False, "user_defined_symbols": USER_DEFINED}], ids=["llama", "gemma"]
)
def test_tokens_are_sentencepieces_and_llama_cpps(
    options: dict[str, Any],
    train: Callable[..., sentencepiece.SentencePieceProcessor],
    tmp_path: Path,
    mixed_text: Callable[..., str],
    compared: Comparison,
    write_vocab: Callable[..., Path],
) -> None:
    processor = train(**options)
    configure(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, add_bos_token=True)
    pairs = read_tokenizer(tmp_path, N_PIECES)
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in pairs.items()}
    names = [keys.pop(key) for key in ("model", "tokens", "token_type")]
    text = mixed_text(100_000, seed=12).replace("\0", "")
    with compared(write_vocab(tmp_path / "vocab.gguf", *names, **keys)) as (tokenizer, vocab, check):
        assert check(text) > 20_000
        assert tokenizer.encode(text) == processor.EncodeAsIds(text)
        assert check(text, add_special=True, parse_special=True)
        assert vocab.role("bos") == processor.bos_id()
        assert vocab.role("eos") == processor.eos_id()
        assert tokenizer.encode("a", add_special=True)[0] == processor.bos_id()
        if options:
            assert processor.PieceToId("<tool>") in tokenizer.encode("a<tool>b")


def test_added_tokens_and_padding(
    train: Callable[..., sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    processor = train(add_dummy_prefix=False)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": N_PIECES + 2}))
    decoder = {
        "1": {"content": "<s>", "special": True},
        str(N_PIECES): {"content": "<|user|>", "special": True},
        str(N_PIECES + 1): {"content": "<call>", "special": False},
    }
    configure(tmp_path, added_tokens_decoder=decoder, eos_token="<|user|>", chat_template="{{ messages }}")
    pairs = read_tokenizer(tmp_path, N_PIECES + 8)
    kinds, texts = pairs["tokenizer.ggml.token_type"], pairs["tokenizer.ggml.tokens"]
    assert isinstance(kinds, list)
    assert isinstance(texts, list)
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[N_PIECES:] == [3, 4, 4, 5, 5, 5, 5, 5]
    assert texts[N_PIECES:][:4] == ["<|user|>", "<call>", "<extra>", f"[PAD{N_PIECES + 3}]"]
    assert pairs["tokenizer.ggml.eos_token_id"] == N_PIECES
    assert pairs["tokenizer.ggml.bos_token_id"] == processor.bos_id()
    assert pairs["tokenizer.ggml.add_bos_token"] is True
    assert pairs["tokenizer.chat_template"] == "{{ messages }}"
    ids = Tokenizer.from_metadata(pairs).encode("a<call>b<|user|>", parse_special=True)
    assert ids == [processor.PieceToId("a"), N_PIECES + 1, processor.PieceToId("b"), N_PIECES]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"model_type": "unigram"}, "is a UNIGRAM model, llama.cpp and EdgeKV merge pairs"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters .nmt_nfkc. before it merges"),
        ({"remove_extra_whitespaces": True}, "drops repeated spaces"),
        ({"byte_fallback": False}, "no tokens for single bytes"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(
    options: dict[str, Any],
    phrase: str,
    train: Callable[..., sentencepiece.SentencePieceProcessor],
    tmp_path: Path,
) -> None:
    train(**options)
    with pytest.raises(UnsupportedError, match=rf"{phrase}.*; choose a model"):
        read_tokenizer(tmp_path, N_PIECES)


def test_what_does_not_fit_the_model(
    train: Callable[..., sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    train()
    with pytest.raises(ModelFileError, match=f"has {N_PIECES} tokens and the model 500; tokenizer and"):
        read_tokenizer(tmp_path, 500)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 5000}))
    with pytest.raises(ModelFileError, match=f"adds a token 5000 and the model has {N_PIECES}; "):
        read_tokenizer(tmp_path, N_PIECES)
    for wrong in ({"<extra>": "x"}, {"<extra>": 4.0}, {"<extra>": float("inf")}, {"\ud800": 4}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelFileError, match="cannot be read"):
            read_tokenizer(tmp_path, N_PIECES)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ModelFileError, match=r"not a sound SentencePiece model.*; download it again"):
        read_tokenizer(tmp_path, N_PIECES)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        InputError, match=r"tokenizer.model and no tokenizer.json.*pip install 'edgekv\[sentenc"
    ):
        read_tokenizer(tmp_path, 10)


def test_rules_of_added_tokens(
    train: Callable[..., sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    """Phi-3's swallow the white space behind them; llama.cpp knows no other rule."""
    train(add_dummy_prefix=False)
    decoder: dict[str, dict[str, object]] = {
        "2": {"content": "</s>", "rstrip": True, "special": True},
        str(N_PIECES): {"content": "<|user|>", "rstrip": True, "special": True},
        str(N_PIECES + 1): {"content": "<|endoftext|>", "special": True},
    }
    configure(tmp_path, added_tokens_decoder=decoder)
    pairs = read_tokenizer(tmp_path, N_PIECES + 8)
    assert str(pairs["general.name"]).endswith("(Phi-3)")
    tokens = Tokenizer.from_metadata(pairs).encode("<|user|>\n <|endoftext|>", parse_special=True)
    assert tokens == [N_PIECES, N_PIECES + 1]
    for rule in ("lstrip", "single_word"):
        configure(tmp_path, added_tokens_decoder={"2": {"content": "</s>", rule: True}})
        with pytest.raises(UnsupportedError, match=rf"{rule}.*; choose a model without"):
            read_tokenizer(tmp_path, N_PIECES + 8)
