"""The two byte-pair encodings of GGUF vocabularies, over text without special tokens.

Both mirror src/llama-vocab.cpp: llm_tokenizer_bpe_session and llm_tokenizer_spm_session.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from tokenizers import Regex, pre_tokenizers

from edgekv.errors import ModelFileError
from edgekv.tokenizer.pre_tokenize import PreType, splitters
from edgekv.tokenizer.vocab import Vocab

if TYPE_CHECKING:
    from edgekv.spec import MetaValue

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's letters for the 256 bytes: printable ones are themselves, the others follow from U+0100.
BYTE_OF_LETTER: Mapping[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}
KNOWN_WORDS = 1 << 13  # words whose tokens are kept: text repeats most of its words
GONE = -1  # a token that became part of the one before it
SPACE = "\u2581"  # SentencePiece's visible space


class ByteLevel:
    """GPT-2's byte-level BPE; Hugging Face's `tokenizers` cuts the text into words.

    Its own BPE is as fast, but holds each token as two strings and each merge in a hash map: 20 MB for 49,152 tokens,
    which a small board needs for the model.
    """

    def __init__(self, vocab: Vocab, metadata: Mapping[str, MetaValue], kind: PreType) -> None:
        self._merges = Merges(vocab.ids, merge_lines(metadata))
        self._letters = {letter: vocab.ids[letter] for letter in BYTE_OF_LETTER if letter in vocab.ids}
        self._whole_words = vocab.ids if kind.ignore_merges else {}
        self._known: dict[str, tuple[int, ...]] = {}
        self._words = word_splitter(vocab, kind)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Tokens of a text; what stands before it does not matter here."""
        ids: list[int] = []
        for word, _ in self._words.pre_tokenize_str(text):
            if (found := self._known.get(word)) is None:
                if len(self._known) >= KNOWN_WORDS:
                    self._known.clear()
                found = self._known[word] = self._encode_word(word)
            ids += found
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if (whole := self._whole_words.get(word)) is not None:
            return (whole,)
        return self._merges.apply([self._letters[letter] for letter in word if letter in self._letters])

    def piece(self, text: str) -> bytes:
        """The bytes that a token's text spells."""
        return b"".join(
            bytes([BYTE_OF_LETTER[letter]]) if letter in BYTE_OF_LETTER else letter.encode()
            for letter in text
        )


def merge_lines(metadata: Mapping[str, MetaValue]) -> Sequence[object]:
    """The merges of a GGUF, "left right", the most urgent first.

    Raises:
        ModelFileError: it has none.
    """
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise ModelFileError("the vocabulary has no merges (tokenizer.ggml.merges); export the model again")
    return lines


def word_splitter(vocab: Vocab, kind: PreType) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words, spelled in GPT-2's letters."""
    steps = [*splitters(kind), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    # A byte without a token vanishes, yet what stood on its two sides must not merge.
    if missing := "".join(letter for letter in BYTE_OF_LETTER if letter not in vocab.ids):
        codes = "".join(rf"\x{{{ord(letter):x}}}" for letter in missing)
        steps.append(pre_tokenizers.Split(Regex(f"[{codes}]"), "isolated"))
    return pre_tokenizers.Sequence(steps)


class Merges:
    """Pairs of tokens that become one, by rank: sorted arrays, 16 bytes per merge."""

    def __init__(self, ids: Mapping[str, int], lines: Sequence[object]) -> None:
        """`lines` are "left right", the most urgent first; of two equal ones the first counts."""
        found: dict[int, tuple[int, int]] = {}
        for rank, line in enumerate(lines):
            left, space, right = str(line).partition(" ")
            try:
                if space:
                    found.setdefault(ids[left] << 32 | ids[right], (rank, ids[left + right]))
            except KeyError as error:
                raise ModelFileError(
                    f"the merges do not fit the vocabulary: no token {error}; export the model again"
                ) from None
        pairs = sorted(found)
        self._pairs = array("q", pairs)  # left << 32 | right
        self._ranks = array("i", [found[pair][0] for pair in pairs])
        self._merged = array("i", [found[pair][1] for pair in pairs])

    def apply(self, ids: list[int]) -> tuple[int, ...]:
        """Merge neighbours until no pair is left: the lowest rank first, then the leftmost. `ids` is used up."""
        after = [*range(1, len(ids)), -1]
        before = list(range(-1, len(ids) - 1))
        # rank, left, right, their tokens, the merged one
        queue: list[tuple[int, int, int, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                pair = ids[left] << 32 | ids[right]
                i = bisect_left(self._pairs, pair)
                if i < len(self._pairs) and self._pairs[i] == pair:
                    heappush(queue, (self._ranks[i], left, right, ids[left], ids[right], self._merged[i]))

        for i in range(1, len(ids)):
            offer(i - 1, i)
        while queue:
            _, left, right, was_left, was_right, merged = heappop(queue)
            if ids[left] != was_left or ids[right] != was_right:
                continue  # one of the two has been merged since
            ids[left], ids[right] = merged, GONE
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return tuple(token for token in ids if token != GONE)


class SentencePiece:
    """SentencePiece's BPE: over the whole text, the pair with the highest score is merged first."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, MetaValue]) -> None:
        scores = metadata.get("tokenizer.ggml.scores")
        self.scores = [float(s) for s in scores] if isinstance(scores, list) else [0.0] * len(vocab)
        self._ids = vocab.ids
        self.add_space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Tokens of a text; at the start and after a special token a space may be put before it."""
        if self.add_space_prefix and after_special:
            text = " " + text
        symbols = self._merge(text.replace(" ", SPACE))
        return [i for symbol in symbols for i in self._token_or_bytes(symbol)]

    def piece(self, text: str) -> bytes:
        """The bytes that a token's text spells."""
        return text.replace(SPACE, " ").encode()

    def _merge(self, text: str) -> list[str]:
        """Merge neighbours until no pair is a token: highest score first, then the leftmost."""
        symbols: list[str] = list(text)
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, str]] = []  # (-score, left, right, merged text)

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                merged = symbols[left] + symbols[right]
                if (token := self._ids.get(merged)) is not None:
                    heappush(queue, (-self.scores[token], left, right, merged))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, merged = heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != merged:
                continue  # one of the two has been merged since
            symbols[left], symbols[right] = merged, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _token_or_bytes(self, symbol: str) -> list[int]:
        if (token := self._ids.get(symbol)) is not None:
            return [token]
        ids = [self._ids.get(f"<0x{byte:02X}>") for byte in symbol.encode()]
        if None in ids:
            raise ModelFileError(
                f"the vocabulary has no byte tokens to spell {symbol!r}; export the model again"
            )
        return [i for i in ids if i is not None]
