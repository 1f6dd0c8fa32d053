"""The vocabulary of a model that llama.cpp has loaded, as an edgekv.tokenizer.language.Language."""

from __future__ import annotations

import ctypes
from typing import Any

from edgekv.errors import BackendError
from edgekv.tokenizer.language import without_surrogates

_UNKNOWN, _CONTROL = 1, 8  # bits of enum llama_token_attr (include/llama.h)


class LlamaLanguage:
    """A loaded model's vocabulary; usable only while the model is open.

    Args:
        api: the module llama_cpp.llama_cpp.
        model: its llama_model pointer.
    """

    def __init__(self, api: Any, model: Any) -> None:
        self._api = api
        self._vocab = api.llama_model_get_vocab(model)
        self._n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        template = api.llama_model_chat_template(model, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None
        bos, eos = int(api.llama_vocab_bos(self._vocab)), int(api.llama_vocab_eos(self._vocab))
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self.stop_ids = frozenset(
            token for token in range(self._n_vocab) if api.llama_vocab_is_eog(self._vocab, token)
        )

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Tokens of a text; see edgekv.tokenizer.tokenizer.Tokenizer.encode.

        Raises:
            BackendError: llama.cpp cannot tokenize it (over 2**31 tokens).
        """
        data = without_surrogates(text).encode()
        room = len(data) + 8  # a token is at least one byte; 8 more for special tokens that are added
        ids = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        if count < 0:
            raise BackendError(f"llama.cpp could not tokenize a text of {len(data)} bytes; shorten it")
        return list(ids[:count])

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for.

        Raises:
            IndexError: there is no such token.
        """
        if not 0 <= token < self._n_vocab:
            raise IndexError(f"token {token} is outside the vocabulary of {self._n_vocab}")
        size = 64
        while True:
            piece = ctypes.create_string_buffer(size)
            count = int(self._api.llama_token_to_piece(self._vocab, token, piece, size, 0, True))
            if count >= 0:
                return piece.raw[:count]
            size = -count

    def is_control(self, token: int) -> bool:
        """Whether this is a control token, such as the end of a turn, and not text."""
        return bool(self._api.llama_vocab_get_attr(self._vocab, token) & (_CONTROL | _UNKNOWN))
