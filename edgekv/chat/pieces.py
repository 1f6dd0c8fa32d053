"""PieceEncoder: the tokens of texts that go on from earlier ones, of which only what is new is encoded."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgekv.tokenizer.language import Language

MAX_KEPT_CHARS = 2**20  # of text whose tokens are kept


@dataclass(frozen=True, slots=True)
class _Piece:
    ids: array[int]
    names: tuple[str, ...]  # of the control tokens among them


class PieceEncoder:
    """Language.encode(text, parse_special=True) of texts whose beginnings repeat, as a conversation's do.

    A text is cut before the names of control tokens: encoders split it there first and encode what lies between
    on its own (llama.cpp: tokenizer_st_partition in src/llama-vocab.cpp), so the pieces' tokens are the text's
    unless another special token reaches across a cut. Where two pieces first meet they are encoded together to
    see that none does; if one does, texts are encoded whole from then on.
    """

    def __init__(self, language: Language) -> None:
        self._language = language
        self._names: set[str] = set()  # of control tokens seen so far
        self._cuts = True
        self._kept: dict[
            tuple[str, str], _Piece
        ] = {}  # by the piece before and its own text; used last comes last
        self._n_chars = 0

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, control tokens where it spells their names."""
        return [token for piece in self._pieces(text) for token in piece.ids]

    def control_names(self, text: str) -> list[str]:
        """Names of the control tokens that a text spells, in their order."""
        return [name for piece in self._pieces(text) for name in piece.names]

    def _pieces(self, text: str) -> list[_Piece]:
        pieces: list[_Piece] = []
        before = ""
        for part in self._split(text):
            piece = self._kept.pop((before, part), None)
            if piece is None:
                ids = self._language.encode(before + part, parse_special=True)
                known = pieces[-1].ids.tolist() if pieces else []
                if ids[: len(known)] != known:
                    self._cuts = False
                    return self._pieces(text)
                piece = _Piece(array("i", ids[len(known) :]), tuple(self._control_names(ids[len(known) :])))
                self._names.update(piece.names)
                self._n_chars += len(part)
            self._kept[before, part] = piece
            pieces.append(piece)
            before = part
        while self._n_chars > MAX_KEPT_CHARS:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._n_chars -= len(oldest[1])
        return pieces

    def _split(self, text: str) -> list[str]:
        if not self._names or not self._cuts:
            return [text]
        names = "|".join(map(re.escape, sorted(self._names)))
        return [part for part in re.split(f"(?={names})", text) if part]

    def _control_names(self, ids: Sequence[int]) -> Iterator[str]:
        for token in dict.fromkeys(ids):
            if self._language.is_control(token) and (name := token_name(self._language, token)):
                yield name


def token_name(language: Language, token: int | None) -> str:
    """A control token as text spells it; "" for none."""
    return "" if token is None else language.token_bytes(token).decode("utf-8", "replace")
