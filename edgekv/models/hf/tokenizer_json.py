"""Tokenizers of Hugging Face folders as the key-value pairs of a GGUF; tokenizer.json is read here.

Special tokens, merges and chat template are read by gguf-py (gguf.SpecialVocab). Which of llama.cpp's
pre-tokenizers a tokenizer has is found by what it does to a text that tells them apart, and the outcome is
proved: EdgeKV's tokenizer, which gives llama.cpp's tokens, has to give those of tokenizer.json.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.hf.checkpoint import read_json
from edgekv.models.hf.special_tokens import (
    ELSEWHERE,
    PROBE,
    looks_special,
    proved,
    read_special,
    refuse_rules,
    special_pairs,
)
from edgekv.models.hf.tokenizer_model import NAME, read_sentencepiece
from edgekv.spec import MetaValue
from edgekv.tokenizer.bpe import SPACE
from edgekv.tokenizer.pre_tokenize import PRE_TYPES, splitters
from edgekv.tokenizer.vocab import TokenType

_RULES = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_TIKTOKEN = "tiktoken.model"
_PREFERRED = ("llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-v3", "deepseek-llm", "tekken", "gpt-4o")


def read_tokenizer(folder: Path, n_vocab: int) -> dict[str, MetaValue]:
    """The tokenizer of a model folder as GGUF key-value pairs; none for a folder without any tokenizer.

    Args:
        folder: holds tokenizer.json or tokenizer.model, tokenizer_config.json and whatever the chat template is in.
        n_vocab: rows of the embedding; ids without a token are filled up.

    Raises:
        InputError: there is only a tokenizer.model, and the sentencepiece library is not installed.
        ModelFileError: a file is malformed, or has more tokens than the model.
        UnsupportedError: llama.cpp would not tokenize as the tokenizer does.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return _read_json(path, n_vocab)
    if (folder / NAME).is_file():
        return read_sentencepiece(folder, n_vocab)
    if (folder / _TIKTOKEN).is_file():
        raise UnsupportedError(
            f"{folder}: has Kimi's {_TIKTOKEN}; llama.cpp's 'kimi-k2' cuts words at combining marks (Hindi, Thai), "
            "Kimi's own tokenizer does not: tokens would differ; llama.cpp's convert_hf_to_gguf.py writes it all the "
            "same, and `edgekv quantize` takes that GGUF"
        )
    return {}


def _read_json(path: Path, n_vocab: int) -> dict[str, MetaValue]:
    document = read_json(path)
    try:
        tokenizer = HFTokenizer.from_file(str(path))
    except Exception as error:  # the extension raises nothing narrower
        raise ModelFileError(f"{path}: is not a sound tokenizer: {error}; download it again") from None
    tokenizer.no_truncation()  # left from training; transformers turns both off as well
    tokenizer.no_padding()
    _with_config_tokens(tokenizer, path.parent)
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"{path}: a {model.get('type')} tokenizer is not supported; EdgeKV reads byte-pair encodings"
        )
    if model.get("dropout"):
        raise UnsupportedError(
            f"{path}: merges at random (dropout is {model['dropout']}), llama.cpp does not; write null there, as for "
            "every use of a trained model"
        )
    texts = _texts(tokenizer, n_vocab, path)
    pairs = (
        _sentencepiece(texts, document) if model.get("byte_fallback") else _byte_level(tokenizer, model, path)
    )
    pairs |= {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": _types(texts, tokenizer, document),
    }
    special = read_special(path.parent, n_vocab, merges=not model.get("byte_fallback"))
    if model.get("byte_fallback"):
        first = tokenizer.encode("a", add_special_tokens=False).tokens[0]
        pairs["tokenizer.ggml.add_space_prefix"] = first.startswith(SPACE)
    else:
        pairs["tokenizer.ggml.merges"] = special.merges
    pairs |= special_pairs(path.parent, texts, special, _framed(tokenizer))
    wanted = tokenizer.encode(PROBE, add_special_tokens=False).ids
    return proved(pairs, wanted, path, _swallowing(tokenizer, path))


def _with_config_tokens(tokenizer: HFTokenizer, folder: Path) -> None:
    """Add the tokens of tokenizer_config.json; those that are there already get its rules, as in transformers."""
    path = folder / "tokenizer_config.json"
    entries = (read_json(path).get("added_tokens_decoder") if path.is_file() else None) or {}
    there = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    try:
        tokens = [
            AddedToken(
                entries[i]["content"], **{rule: entries[i][rule] for rule in _RULES if rule in entries[i]}
            )
            for i in sorted(entries, key=int)
        ]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelFileError(
            f"{path}: added_tokens_decoder cannot be read: {error!r}; download it again"
        ) from None
    for token in tokens:
        if repr(token) not in there:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _swallowing(tokenizer: HFTokenizer, path: Path) -> frozenset[int]:
    """Added tokens that swallow the white space behind them; refuses those with other rules."""
    tokens = tokenizer.get_added_tokens_decoder()
    for token in tokens.values():
        refuse_rules(path, token.content, token.lstrip, token.single_word)
        plain = token.normalized and not token.special and not looks_special(token.content)
        if (
            plain
            and tokenizer.normalizer
            and tokenizer.normalizer.normalize_str(token.content) != token.content
        ):
            raise UnsupportedError(
                f"{path}: the added token {token.content!r} is looked for in normalized text (normalized), by "
                f"llama.cpp in the text as it is: tokens would differ; {ELSEWHERE}"
            )
    return frozenset(i for i, token in tokens.items() if token.rstrip)


def _texts(tokenizer: HFTokenizer, n_vocab: int, path: Path) -> list[str]:
    """The text of every id; [PAD<id>] where there is no token, as llama.cpp's converter has it."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if ids and max(ids.values()) >= n_vocab:
        raise ModelFileError(
            f"{path}: has {max(ids.values()) + 1} tokens and the model {n_vocab}; tokenizer and weights are not "
            "of one model: download both again"
        )
    texts = [f"[PAD{i}]" for i in range(n_vocab)]
    for text, i in ids.items():
        texts[i] = text
    return texts


def _types(texts: list[str], tokenizer: HFTokenizer, document: dict[str, Any]) -> list[int]:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    kinds = [int(TokenType.UNUSED)] * len(texts)
    fallback = bool(document["model"].get("byte_fallback"))
    for text, i in ids.items():
        is_byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kinds[i] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for i, token in tokenizer.get_added_tokens_decoder().items():
        control = token.special or looks_special(token.content)
        kinds[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    unknown = document["model"].get("unk_token")
    if fallback and unknown in ids:
        kinds[ids[unknown]] = int(TokenType.UNKNOWN)
    return kinds


def _byte_level(tokenizer: HFTokenizer, model: dict[str, Any], path: Path) -> dict[str, MetaValue]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_type(tokenizer, bool(model.get("ignore_merges")), path),
    }


def _sentencepiece(texts: list[str], document: dict[str, Any]) -> dict[str, MetaValue]:
    """Scores that merge as the list of merges does: earlier ones first, tokens that no merge gives last."""
    ranks: dict[str, int] = {}
    merges = document["model"].get("merges", [])
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(text, len(merges))) for text in texts]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}


@cache
def _known_splits() -> dict[str, tuple[str, ...]]:
    """What each of llama.cpp's pre-tokenizers makes of PROBE."""
    found = {}
    for name in (*_PREFERRED, *PRE_TYPES):
        steps = [
            *splitters(PRE_TYPES[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        words = pre_tokenizers.Sequence(steps).pre_tokenize_str(PROBE)
        found[name] = tuple(word for word, _ in words)
    return found


def _pre_type(tokenizer: HFTokenizer, ignore_merges: bool, path: Path) -> str:
    """Which of llama.cpp's pre-tokenizers splits as this one does."""
    if tokenizer.pre_tokenizer is None:
        raise UnsupportedError(f"{path}: a tokenizer without a pre-tokenizer is not supported")
    words = tuple(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(PROBE))
    for name, split in _known_splits().items():
        if split == words and PRE_TYPES[name].ignore_merges == ignore_merges:
            return name
    raise UnsupportedError(
        f"{path}: splits text as none of llama.cpp's pre-tokenizers does, its tokens would differ there; "
        "choose a model that llama.cpp knows"
    )


def _framed(tokenizer: HFTokenizer) -> dict[str, bool]:
    """Whether the tokenizer puts a token before a text and one behind it."""
    plain, framed = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    return {"bos": framed[:1] != plain[:1], "eos": framed[-1:] != plain[-1:]}
