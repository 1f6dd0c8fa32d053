"""The Language protocol: what a conversation needs to know of a model's vocabulary, whichever process holds it.

`edgekv.tokenizer.tokenizer.Tokenizer` holds it in this process, `edgekv.backends.isolated.backend.EngineLanguage`
asks the engine's process for it: a second vocabulary costs 40 MB of memory for 49,152 tokens.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol

_SURROGATES = re.compile("[\ud800-\udfff]")  # what is left of undecodable input


class Language(Protocol):
    """Texts to tokens and back; the members are those of `edgekv.tokenizer.tokenizer.Tokenizer`."""

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if the model has one."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the model has one."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end generation."""

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Tokens of a text."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for."""

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model and is not part of the text."""


def opening_tokens(language: Language) -> list[int]:
    """The beginning-of-text token, if the model wants one before a text; else nothing."""
    first = language.encode("", add_special=True)[:1]
    return [token for token in first if token == language.bos_id]


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for what no UTF-8 can hold."""
    return _SURROGATES.sub("\ufffd", text)


class TokenStream:
    """Gives text as soon as its bytes are complete UTF-8; together it is what `Tokenizer.decode` gives.

    Only SentencePiece's leading space is kept: an answer continues a prompt.
    """

    def __init__(self, language: Language, special: bool = False) -> None:
        self._language = language
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of an emoji."""
        if self._language.is_control(token) and not self._special:
            return ""
        return self._decoder.decode(self._language.token_bytes(token))

    def finish(self) -> str:
        """What an incomplete last character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
