"""A GGUF's vocabulary as llama.cpp understands it: what each token is, and where generation ends.

Mirrors llama_vocab::impl::load in src/llama-vocab.cpp of the llama.cpp that llama-cpp-python 0.3.36
carries; tests/tokenizer/test_vocab.py compares every token with it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from types import MappingProxyType
from typing import cast

from edgekv.errors import ModelFileError
from edgekv.spec import MetaValue


class TokenType(IntEnum):
    """What a token is in a GGUF (tokenizer.ggml.token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# What a token is in llama.cpp, one bit each (enum llama_token_attr).
UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE = (1 << i for i in range(6))
_ATTRIBUTES: Mapping[int, int] = MappingProxyType(
    dict(zip(TokenType, (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE), strict=True))
)

_ROLE_KEYS: Mapping[str, str] = MappingProxyType(  # later keys win: the last three are the older names
    {f"tokenizer.ggml.{role}_token_id": role for role in ("bos", "eos", "eot", "eom")}
    | {
        f"tokenizer.ggml.fim_{role}_token_id": f"fim_{role}"
        for role in ("pre", "suf", "mid", "pad", "rep", "sep")
    }
    | {f"tokenizer.ggml.{name}_token_id": f"fim_{name[:3]}" for name in ("prefix", "suffix")}
    | {"tokenizer.ggml.middle_token_id": "fim_mid"}
)
_DEFAULT_ROLES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}
)
# Roles found by the token's text when no key names them.
_ROLE_TEXTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "eot": (
            *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
            *("<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
        ),
        "eom": ("<|eom_id|>",),
        "fim_pre": (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
            *("<|code_prefix|>", "<|prefix|>"),
        ),
        "fim_suf": (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
            *("<|code_suffix|>", "<|suffix|>"),
        ),
        "fim_mid": (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
            *("<|code_middle|>", "<|middle|>"),
        ),
        "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "fim_sep": ("<|file_sep|>",),
    }
)
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocab:
    """The tokens of a model: `texts[id]`, `attributes[id]` (bits), and the ids of the roles they play.

    `roles` holds bos, eos, eot, eom and the fim_ ones that exist; `stop_ids` end generation.
    """

    texts: tuple[str, ...]
    attributes: tuple[int, ...]
    ids: Mapping[str, int]
    roles: Mapping[str, int]
    stop_ids: frozenset[int]

    def __len__(self) -> int:
        return len(self.texts)


class PackedTexts:
    """Strings by index in one block of bytes: a tenth of the memory of a tuple of as many short strings."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = array("Q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


def read_vocab(metadata: Mapping[str, MetaValue], default_bos: bool = True) -> Vocab:
    """Read the vocabulary; `default_bos` is false where llama.cpp assumes no beginning-of-text token.

    Raises:
        ModelFileError: there is none, or its parts contradict each other.
    """
    check_vocabulary(metadata)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelFileError(
            "the model has no vocabulary (tokenizer.ggml.tokens); export it with its tokenizer"
        )
    texts = token_texts([str(token) for token in tokens])
    ids = {text: i for i, text in enumerate(texts)}
    types = metadata.get("tokenizer.ggml.token_type")
    kinds = types[: len(texts)] if isinstance(types, list) else [TokenType.NORMAL] * len(texts)
    attributes = [_ATTRIBUTES.get(int(kind), 0) for kind in kinds]
    roles = dict(_DEFAULT_ROLES.get(str(metadata.get("tokenizer.ggml.model")), {}))
    if not default_bos:
        roles.pop("bos", None)
    roles = {role: i for role, i in roles.items() if i < len(texts)}
    for key, role in _ROLE_KEYS.items():
        value = metadata.get(key)
        if isinstance(value, int) and 0 <= value < len(texts):
            roles[role] = value
    for role, names in _ROLE_TEXTS.items():
        found = next((ids[name] for name in names if name in ids), None)
        if role not in roles and found is not None:
            roles[role] = found
            attributes[found] |= CONTROL
    stop_ids = _stop_ids(ids, roles, attributes)
    return Vocab(tuple(texts), tuple(attributes), MappingProxyType(ids), MappingProxyType(roles), stop_ids)


def text_tokens(metadata: Mapping[str, MetaValue], n_vocab: int) -> list[int]:
    """Ids that stand for text, neither control nor unused tokens; all ids where the types are not known."""
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list):
        return list(range(n_vocab))
    return [i for i, kind in enumerate(types) if kind == TokenType.NORMAL]


def _stop_ids(ids: Mapping[str, int], roles: Mapping[str, int], attributes: list[int]) -> frozenset[int]:
    """Tokens that end generation; makes them control tokens in `attributes`, as llama.cpp does."""
    stop = {roles[role] for role in ("fim_pad", "fim_rep", "fim_sep") if role in roles}
    for text in END_TEXTS:
        if text in ids:
            stop.add(ids[text])
            attributes[ids[text]] |= CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            attributes[ids[text]] = USER_DEFINED
    stop |= {roles[role] for role in ("eos", "eot", "eom") if role in roles}

    def stops(*texts: str) -> bool:
        return all(ids.get(text) in stop for text in texts)

    call = stops("<|call|>") or stops("<|calls|>")
    if stops("<|end|>") and call and (stops("<|return|>") or stops("<|flush|>")):  # harmony, solar-open
        stop.remove(ids["<|end|>"])
        attributes[ids["<|end|>"]] = USER_DEFINED
    if stops("</s>") and (stops("<|tool_response>") or stops("<|plamo:eos|>")):  # there it is plain text
        stop.remove(ids["</s>"])
        attributes[ids["</s>"]] = NORMAL
    return frozenset(stop)


def check_vocabulary(metadata: Mapping[str, MetaValue]) -> None:
    """Tokens are distinct and each has its type and score; llama.cpp aborts the process on a duplicate.

    Raises:
        ModelFileError: they are not.
    """
    tokens = _tokens(metadata)
    for key, kinds in (("token_type", int), ("scores", int | float)):
        values = metadata.get(f"tokenizer.ggml.{key}", [0] * len(tokens))
        if (
            not isinstance(values, list)
            or len(values) < len(tokens)
            or not isinstance(values[0] if values else 0, kinds)
        ):
            raise ModelFileError(
                f"tokenizer.ggml.{key} does not fit {len(tokens)} tokens; download or export the file again"
            )
    texts = token_texts(tokens)
    if len(set(texts)) < len(texts):
        twice = next(text for text, n in Counter(texts).items() if n > 1)
        raise ModelFileError(f"token {twice!r} occurs twice in the vocabulary; export the file again")


def _tokens(metadata: Mapping[str, MetaValue]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not isinstance(tokens[0] if tokens else "", str):
        raise ModelFileError(
            "tokenizer.ggml.tokens is not a list of strings; download or export the file again"
        )
    return cast("list[str]", tokens)


def token_texts(tokens: list[str]) -> list[str]:
    """The tokens as llama.cpp names them: cut at a zero byte, an empty one by its index."""
    if all(tokens) and "\0" not in "".join(tokens):  # nearly always, and vocabularies are large
        return tokens
    return [token.partition("\0")[0] or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
