"""The tokenizer of a GGUF: text to tokens and back with the file's own vocabulary, where llama.cpp does not run.

Special tokens are cut out here; what lies between them goes through one of the two encodings of
edgekv.tokenizer.bpe (`tokenizer.ggml.model`: gpt2 or llama). All tokens are llama.cpp's: src/llama-vocab.cpp, and
the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.tokenizer.bpe import ByteLevel, SentencePiece
from edgekv.tokenizer.language import without_surrogates
from edgekv.tokenizer.pre_tokenize import PRE_TYPES
from edgekv.tokenizer.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    PackedTexts,
    Vocab,
    read_vocab,
)

if TYPE_CHECKING:
    from edgekv.spec import MetaValue

_WHITESPACE = tuple(" \t\n\v\f\r")
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Encodes and decodes as llama.cpp does with the same file.

    `bos_id` and `eos_id` are None if the model has none. `stop_ids` are the tokens that end generation,
    `eats_space` those that swallow the white space behind them.
    """

    def __init__(
        self, vocab: Vocab, model: ByteLevel | SentencePiece, metadata: Mapping[str, MetaValue], add_bos: bool
    ) -> None:
        # Not the vocabulary itself: its strings and dict are 10 MB of objects for 49,152 tokens.
        self._texts = PackedTexts(vocab.texts)
        self._attributes = bytes(vocab.attributes)
        self._model = model
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self.bos_id = vocab.roles.get("bos")
        self.eos_id = vocab.roles.get("eos")
        self.stop_ids = vocab.stop_ids
        self._add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
        self._add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
        self._strip_space = isinstance(model, SentencePiece) and model.add_space_prefix
        if (self._add_bos and self.bos_id is None) or (self._add_eos and self.eos_id is None):
            raise ModelFileError(
                "the tokenizer adds a beginning- or end-of-text token and names none; export the model again"
            )
        special = [i for i, bits in enumerate(vocab.attributes) if bits & (CONTROL | USER_DEFINED | UNKNOWN)]
        special.sort(key=lambda i: -len(vocab.texts[i].encode()))
        self._special = special
        self.eats_space = _eats_space(vocab, special, str(metadata.get("general.name", "")))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, MetaValue]) -> Tokenizer:
        """Build the tokenizer that a GGUF's key-value pairs describe.

        Raises:
            ModelFileError: the vocabulary is missing or contradicts itself.
            UnsupportedError: the kind of tokenizer is not one of those that are proved equal.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "llama":
            vocab = read_vocab(metadata)
            return cls(vocab, SentencePiece(vocab, metadata), metadata, add_bos=True)
        if kind != "gpt2":
            raise UnsupportedError(
                f"tokenizer {kind!r} is not supported; EdgeKV reads 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece); choose a model with one of these"
            )
        name = str(metadata.get("tokenizer.ggml.pre", "default"))
        if name not in PRE_TYPES:
            raise UnsupportedError(
                f"pre-tokenizer {name!r} is not supported; EdgeKV reads {', '.join(sorted(PRE_TYPES))}; "
                "choose a model with one of these"
            )
        pre = PRE_TYPES[name]
        vocab = read_vocab(metadata, default_bos=pre.has_bos)
        return cls(vocab, ByteLevel(vocab, metadata, pre), metadata, pre.add_bos)

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Tokens of a text.

        Args:
            add_special: add the beginning- and end-of-text tokens that the model wants.
            parse_special: read control tokens such as <|im_start|> in the text as such. Leave it off for
                text that is not your own.
        """
        text = without_surrogates(text)
        ids = [self.bos_id] if add_special and self._add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(part, after_special)
            after_special = isinstance(part, int)
        if add_special and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of tokens; `special` also shows control tokens. Bytes that are not UTF-8 become U+FFFD."""
        pieces = [self.token_bytes(i) if special or not self.is_control(i) else b"" for i in ids]
        if self._strip_space and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Bytes a token stands for: a control token's name, nothing for an unused one.

        Raises:
            IndexError: there is no such token.
        """
        if not 0 <= token < len(self._texts):
            raise IndexError(f"token {token} is outside the vocabulary of {len(self._texts)}")
        bits, text = self._attributes[token], self._texts[token]
        if bits & (CONTROL | UNKNOWN | USER_DEFINED):
            return text.encode()
        if bits & NORMAL:
            return self._model.piece(text)
        return bytes([int(text[3:5], 16)]) if bits & BYTE and _BYTE_TOKEN.fullmatch(text) else b""

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model and is not part of the text."""
        return bool(self._attributes[token] & (CONTROL | UNKNOWN))

    def _partition(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """Text between special tokens, and their ids: longest first, as tokenizer_st_partition does."""
        parts: list[str | int] = [text] if text else []
        for token in self._special:
            name = self._texts[token]
            if name in text and (parse_special or not self.is_control(token)):
                parts = [piece for part in parts for piece in self._split(part, token, name)]
        return iter(parts)

    def _split(self, part: str | int, token: int, name: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        start = 0
        while (at := part.find(name, start)) >= 0:
            if at > start:
                yield part[start:at]
            yield token
            start = at + len(name)
            while token in self.eats_space and part[start : start + 1] in _WHITESPACE:
                start += 1
        if start < len(part):
            yield part[start:]


def _eats_space(vocab: Vocab, special: list[int], model_name: str) -> frozenset[int]:
    """Special tokens that swallow the whitespace after them: Phi-3's, which GGUFs do not mark."""
    if not re.search("phi-?3", model_name.lower()):
        return frozenset()
    plain = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(i for i in special if vocab.texts[i] not in plain)
