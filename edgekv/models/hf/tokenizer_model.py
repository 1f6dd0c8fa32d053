"""SentencePiece's tokenizer.model as the key-value pairs that a GGUF keeps a tokenizer in.

Read with the `sentencepiece` library, an extra. Its kinds of pieces are GGUF's kinds of tokens, by number
(google/sentencepiece src/sentencepiece_model.proto, ModelProto.SentencePiece.Type). gguf-py's
SentencePieceVocab drops one of them, USER_DEFINED, which llama.cpp and SentencePiece both look for before
anything is merged. Tokens that were added afterwards stand in two JSON files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.models.hf.checkpoint import read_json
from edgekv.models.hf.special_tokens import (
    PROBE,
    looks_special,
    proved,
    read_special,
    refuse_rules,
    special_pairs,
)
from edgekv.spec import MetaValue
from edgekv.tokenizer.bpe import SPACE
from edgekv.tokenizer.vocab import TokenType

NAME = "tokenizer.model"
_SCORE_UNUSED, _SCORE_ADDED = -10000.0, -1000.0  # as llama.cpp's converter has them
_COMPATIBLE = " ﬁn ① ｆｕｌｌ ㎏ …"  # what NFKC would change


def read_sentencepiece(folder: Path, n_vocab: int) -> dict[str, MetaValue]:
    """The tokenizer of a folder with tokenizer.model; see edgekv.models.hf.tokenizer_json.read_tokenizer.

    Raises:
        InputError: the sentencepiece library is not installed.
        ModelFileError: a file is malformed, or has more tokens than the model.
        UnsupportedError: llama.cpp would not tokenize as SentencePiece does.
    """
    path = folder / NAME
    processor, model = _load(path)
    _check(model, path)
    texts, scores, kinds = _tokens(model, folder, n_vocab)
    pairs: dict[str, MetaValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": bool(model.normalizer_spec.add_dummy_prefix),
    }
    pairs |= special_pairs(folder, texts, _special(folder, texts, model), {"bos": True, "eos": False})
    text = PROBE + _COMPATIBLE
    return proved(pairs, processor.EncodeAsIds(text), path, _swallowing(folder), text)


def _tokens(model: Any, folder: Path, n_vocab: int) -> tuple[list[str], list[float], list[int]]:
    """Text, score and gguf.TokenType of every id: the model's pieces, padding, and what was added afterwards."""
    if len(model.pieces) > n_vocab:
        raise ModelFileError(
            f"{folder / NAME}: has {len(model.pieces)} tokens and the model {n_vocab}; tokenizer and weights are not "
            "of one model: download both again"
        )
    padding = range(len(model.pieces), n_vocab)
    texts = [piece.piece for piece in model.pieces] + [f"[PAD{i}]" for i in padding]
    scores = [piece.score for piece in model.pieces] + [_SCORE_UNUSED] * len(padding)
    kinds = [int(piece.type) for piece in model.pieces] + [int(TokenType.UNUSED)] * len(padding)
    for i, kind in enumerate(kinds):
        if kind == TokenType.USER_DEFINED:
            texts[i] = texts[i].replace(SPACE, " ")
    for i, (text, control) in _added(folder, n_vocab).items():
        if kinds[i] not in (TokenType.UNUSED, TokenType.NORMAL, TokenType.USER_DEFINED) and texts[i] == text:
            continue
        texts[i], scores[i] = (text if control else text.replace(SPACE, " ")), _SCORE_ADDED
        kinds[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return texts, scores, kinds


def _load(path: Path) -> tuple[Any, Any]:
    """The processor and the file as a message."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            f"{path.parent}: has a {NAME} and no tokenizer.json; reading that needs the sentencepiece package: "
            "pip install 'edgekv[sentencepiece]'"
        ) from None
    try:
        data = path.read_bytes()
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        return SentencePieceProcessor(model_proto=data), model
    except Exception as error:  # both libraries' own kinds, and RuntimeError
        raise ModelFileError(
            f"{path}: is not a sound SentencePiece model: {error}; download it again"
        ) from None


def _check(model: Any, path: Path) -> None:
    """Refuse what llama.cpp's SentencePiece does not do."""
    kinds = model.trainer_spec.ModelType
    if model.trainer_spec.model_type != kinds.Value("BPE"):
        kind = kinds.Name(model.trainer_spec.model_type)
        raise UnsupportedError(
            f"{path}: is a {kind} model, llama.cpp and EdgeKV merge pairs (BPE); choose a model with a BPE "
            "tokenizer"
        )
    if not any(piece.type == TokenType.BYTE for piece in model.pieces):
        raise UnsupportedError(
            f"{path}: has no tokens for single bytes (byte_fallback), which llama.cpp spells unknown characters "
            "with; choose a model that has them"
        )
    normalizer = model.normalizer_spec
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        what = "drops repeated spaces" if normalizer.remove_extra_whitespaces else "normalizes characters"
        raise UnsupportedError(
            f"{path}: {what} ({normalizer.name or 'normalizer'}) before it merges, llama.cpp does not: its tokens "
            "would differ; choose a model without normalization, as Llama's and Gemma's are"
        )


def _added(folder: Path, n_vocab: int) -> dict[int, tuple[str, bool]]:
    """Tokens that were added to the model's: {id: (text, whether it is a control token)}."""
    found: dict[int, tuple[str, bool]] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            for text, i in read_json(folder / "added_tokens.json").items():
                if type(i) is not int:
                    raise TypeError(f"{i!r} is no token's number")
                text.encode()  # JSON can spell halves of characters
                found[i] = (text, looks_special(text))
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"{folder}: added_tokens.json cannot be read: {error!r}; download it again"
        ) from None
    for i, entry in _config_tokens(folder).items():
        text = str(entry["content"])
        found[i] = (text, bool(entry.get("special")) or looks_special(text))
    if found and not 0 <= min(found) <= max(found) < n_vocab:
        raise ModelFileError(
            f"{folder}: adds a token {max(found)} and the model has {n_vocab}; tokenizer and weights are not of "
            "one model: download both again"
        )
    return found


def _config_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """The added tokens of tokenizer_config.json, by id."""
    path = folder / "tokenizer_config.json"
    entries = (read_json(path).get("added_tokens_decoder") if path.is_file() else None) or {}
    try:
        for entry in entries.values():
            entry["content"].encode()
        return {int(i): dict(entry) for i, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{path}: added_tokens_decoder cannot be read: {error!r}; download it again"
        ) from None


def _swallowing(folder: Path) -> frozenset[int]:
    """Added tokens that swallow the white space behind them; refuses those with other rules."""
    tokens = _config_tokens(folder)
    for token in tokens.values():
        lstrip, single_word = bool(token.get("lstrip")), bool(token.get("single_word"))
        refuse_rules(folder / NAME, str(token["content"]), lstrip, single_word)
    return frozenset(i for i, token in tokens.items() if token.get("rstrip"))


def _special(folder: Path, texts: list[str], model: Any) -> gguf.SpecialVocab:
    """Special tokens: by their text in tokenizer_config.json, else as config.json has them, else the model's."""
    special = read_special(folder, len(texts), merges=False)
    config = folder / "tokenizer_config.json"
    named = read_json(config) if config.is_file() else {}
    for role in ("bos", "eos", "unk", "pad"):
        text = named.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        own = getattr(model.trainer_spec, f"{role}_id")
        if isinstance(text, str) and text in texts:
            special.special_token_ids[role] = texts.index(text)
        elif 0 <= own < len(texts):
            special.special_token_ids.setdefault(role, own)
    return special
