"""tokenizer.json as a GGUF's key-value pairs: the same tokens as the `tokenizers` library gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.hf.special_tokens import PROBE
from edgekv.models.hf.tokenizer_json import read_tokenizer
from edgekv.models.open import open_model
from edgekv.tokenizer.tokenizer import Tokenizer

from .conftest import LLAMA3, QWEN2, TEXTS, byte_level


def sentencepiece(prefix: bool) -> HFTokenizer:
    """BPE with byte fallback over visible spaces, as Llama 2 (with a space put first) and Gemma have it."""
    steps = [normalizers.Prepend("▁")] if prefix else []
    trained = HFTokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trained.train_from_iterator([PROBE, *TEXTS] * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    vocab = {text: i for i, text in enumerate(texts)}
    # Conversions from SentencePiece list every pair whose whole is a token, by the rank of the whole.
    merges = [
        (text[:cut], text[cut:])
        for text in learned["vocab"]
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = HFTokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save(tokenizer: HFTokenizer, folder: Path, **config: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def check(folder: Path, tokenizer: HFTokenizer, n_vocab: int) -> dict[str, Any]:
    pairs = read_tokenizer(folder, n_vocab)
    mine = Tokenizer.from_metadata(pairs)
    for text in TEXTS:
        assert mine.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
    return dict(pairs)


@pytest.mark.parametrize(
    ("expression", "options", "name"),
    [(LLAMA3, {"ignore_merges": True}, "llama-bpe"), (QWEN2, {}, "qwen2"), (None, {}, "gpt-2")],
)
def test_byte_level(expression: str | None, options: dict[str, Any], name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(expression, **options)
    save(tokenizer, tmp_path, eos_token="<|im_end|>", bos_token="<|bos|>", chat_template="{{ messages }}")
    pairs = check(tmp_path, tokenizer, 420)
    assert pairs["tokenizer.ggml.pre"] == name
    assert pairs["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert pairs["tokenizer.ggml.add_bos_token"] is False
    assert pairs["tokenizer.chat_template"] == "{{ messages }}"
    assert len(pairs["tokenizer.ggml.tokens"]) == 420
    kinds = pairs["tokenizer.ggml.token_type"]
    assert [kinds[tokenizer.token_to_id(t)] for t in ("<|im_start|>", "<tool>", "a")] == [3, 4, 1]
    assert kinds[-1] == 5
    text = "<|im_start|>user<tool>"
    assert Tokenizer.from_metadata(pairs).encode(text, parse_special=True) == tokenizer.encode(text).ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix)
    save(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    pairs = check(tmp_path, tokenizer, tokenizer.get_vocab_size())
    assert pairs["tokenizer.ggml.model"] == "llama"
    assert pairs["tokenizer.ggml.add_space_prefix"] is prefix
    assert pairs["tokenizer.ggml.add_bos_token"] is True
    kinds = pairs["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6]


def test_beginning_of_text_from_the_post_processor(tmp_path: Path) -> None:
    tokenizer = byte_level(LLAMA3, ignore_merges=True)
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[bos])
    save(tokenizer, tmp_path, bos_token="<|bos|>", eos_token="<|im_end|>")
    pairs = check(tmp_path, tokenizer, 420)
    assert pairs["tokenizer.ggml.add_bos_token"] is True
    assert Tokenizer.from_metadata(pairs).encode("a", add_special=True) == tokenizer.encode("a").ids


def test_real_vocabulary_comes_back_as_it_was(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2's 49,152 tokens: from its GGUF to a tokenizer.json as its folder has it, and back."""
    metadata = open_model(smollm2).metadata
    texts, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    kinds = metadata["tokenizer.ggml.token_type"]
    assert isinstance(texts, list)
    assert isinstance(merges, list)
    assert isinstance(kinds, list)
    pairs = [tuple(str(merge).split(" ", 1)) for merge in merges]
    tokenizer = HFTokenizer(models.BPE(vocab={str(t): i for i, t in enumerate(texts)}, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([str(t) for t, kind in zip(texts, kinds, strict=True) if kind == 3])
    save(tokenizer, tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>")
    found = check(tmp_path, tokenizer, len(texts))
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert found[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key


def test_several_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    save(byte_level(QWEN2), tmp_path, chat_template=templates)
    pairs = read_tokenizer(tmp_path, 420)
    assert pairs["tokenizer.chat_template"] == "A"
    assert pairs["tokenizer.chat_template.tool_use"] == "B"


def test_further_ends_of_text(tmp_path: Path) -> None:
    """As GLM has them; those that llama.cpp knows by their text need no key."""
    tokenizer = byte_level(LLAMA3, ignore_merges=True)
    tokenizer.add_special_tokens(["<|user|>", "<|observation|>"])
    ends = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|user|>", "<|observation|>")]
    save(tokenizer, tmp_path, eos_token="<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    pairs = check(tmp_path, tokenizer, 420)
    assert [pairs[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")] == ends
    assert set(ends) <= Tokenizer.from_metadata(pairs).stop_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[:1]}))
    assert "tokenizer.ggml.eot_token_id" not in check(tmp_path, tokenizer, 420)


def test_more_tokens_than_the_model_has(tmp_path: Path) -> None:
    save(byte_level(QWEN2), tmp_path)
    with pytest.raises(ModelFileError, match=r"has 404 tokens and the model 300"):
        read_tokenizer(tmp_path, 300)


def test_tokenizers_that_llama_cpp_would_change(tmp_path: Path) -> None:
    odd = byte_level(r"[a-c]+|\s+|[^\sa-c]+")
    save(odd, tmp_path)
    with pytest.raises(UnsupportedError, match=r"none of llama.cpp's pre-tokenizers"):
        read_tokenizer(tmp_path, 420)
    lower = byte_level(QWEN2)
    lower.normalizer = normalizers.Lowercase()
    save(lower, tmp_path)
    with pytest.raises(UnsupportedError, match=r"other tokens, first in place 0"):
        read_tokenizer(tmp_path, 420)
    save(HFTokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path)
    with pytest.raises(UnsupportedError, match="WordLevel"):
        read_tokenizer(tmp_path, 420)


def test_no_or_broken_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, 10) == {}
    (tmp_path / "tiktoken.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(
        UnsupportedError, match=r"'kimi-k2' cuts words at combining marks.*; llama.cpp's convert"
    ):
        read_tokenizer(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match="not a sound tokenizer"):
        read_tokenizer(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be read as JSON"):
        read_tokenizer(tmp_path, 10)
