"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekv.errors import BackendError, InputError
from edgekv.source import Array
from edgekv.tokenizer.language import Language

if TYPE_CHECKING:
    import llguidance

ANY_OBJECT = '{"type": "object"}'
MAX_ERROR_CHARS = 300


class Grammars:
    """Grammars over one vocabulary, whose tables are made for the first one (a second for 50,000 tokens)."""

    def __init__(self, language: Language, n_vocab: int) -> None:
        self._language, self._n_vocab = language, n_vocab

    def of_schema(self, schema: str) -> Grammar:
        """A new grammar for one answer.

        Raises:
            InputError: the schema is malformed, too complex, or uses what llguidance does not support.
            BackendError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise BackendError("JSON schemas need llguidance; pip install 'edgekv[serve]'") from error
        tokenizer = self._tokenizer
        try:
            options: Any = {"whitespace_flexible": False}  # else a small model may write blanks without end
            text = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise _refused(str(error)) from error
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher, self._n_vocab)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._language, self._n_vocab)),
            n_vocab=self._n_vocab,
            eos_token=sorted(self._language.stop_ids),
        )


class Grammar:
    """What may come next in one answer."""

    def __init__(self, matcher: llguidance.LLMatcher, n_vocab: int) -> None:
        self._matcher, self._n_vocab = matcher, n_vocab

    def allowed(self, logits: Array) -> Array:
        """Logits (vocab,) with minus infinity for every token that may not come next.

        Raises:
            InputError: nothing may, or llguidance gave up.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._n_vocab].astype(bool)
        if self._matcher.is_error() or not mask.any():
            raise InputError(
                f"the answer cannot go on by its schema: {self._matcher.get_error() or 'no token fits'}"
            )
        return np.where(mask, logits, -np.inf).astype(np.float32)

    def accept(self, token: int) -> bool:
        """Take a token that may come next; whether nothing can follow it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """A Language as llguidance's TokenizerWrapper asks for it."""

    def __init__(self, language: Language, n_vocab: int) -> None:
        self._language = language
        self.tokens = [language.token_bytes(token) for token in range(n_vocab)]
        self.special_token_ids = [token for token in range(n_vocab) if language.is_control(token)]
        self.bos_token_id = language.bos_id
        self.eos_token_id = min(language.stop_ids, default=0)

    def __call__(self, text: bytes) -> list[int]:
        return self._language.encode(text.decode("utf-8", "replace"))


def _refused(cause: str) -> InputError:
    words = " ".join(cause.split())[:MAX_ERROR_CHARS]
    return InputError(f"this JSON schema cannot be followed: {words}; simplify it")
