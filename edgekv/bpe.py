"""The two byte-pair encodings of GGUF vocabularies, over text without special tokens.

Both mirror src/llama-vocab.cpp: llm_tokenizer_bpe_session and llm_tokenizer_spm_session.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from edgekv.errors import ModelFileError
from edgekv.pre_tokenize import PreType, splitters
from edgekv.vocab import Vocab

if TYPE_CHECKING:
    from edgekv.source import MetaValue

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's letters for the 256 bytes: printable ones are themselves, the others follow from U+0100.
BYTE_OF_LETTER: Mapping[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}
SPACE = "\u2581"  # SentencePiece's visible space


class ByteLevel:
    """GPT-2's byte-level BPE on Hugging Face's `tokenizers`; `tokenizer` is the one that runs."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, MetaValue], kind: PreType) -> None:
        lines = metadata.get("tokenizer.ggml.merges")
        if not isinstance(lines, list):
            raise ModelFileError(
                "the vocabulary has no merges (tokenizer.ggml.merges); export the model again"
            )
        # A merge is "left right", and of two equal ones the first counts.
        pairs = dict.fromkeys(tuple(str(line).split(" ", 1)) for line in lines)
        merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
        try:
            model = models.BPE(vocab=dict(vocab.ids), merges=merges, ignore_merges=kind.ignore_merges)
        except Exception as error:  # the extension raises nothing narrower
            raise ModelFileError(
                f"the merges do not fit the vocabulary: {error}; export the model again"
            ) from None
        steps = [*splitters(kind), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        # A byte without a token vanishes, yet what stood on its two sides must not merge.
        if missing := "".join(letter for letter in BYTE_OF_LETTER if letter not in vocab.ids):
            codes = "".join(rf"\x{{{ord(letter):x}}}" for letter in missing)
            steps.append(pre_tokenizers.Split(Regex(f"[{codes}]"), "isolated"))
        self.tokenizer = HFTokenizer(model)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Tokens of a text; what stands before it does not matter here."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, text: str) -> bytes:
        """The bytes that a token's text spells."""
        return b"".join(
            bytes([BYTE_OF_LETTER[letter]]) if letter in BYTE_OF_LETTER else letter.encode()
            for letter in text
        )


class SentencePiece:
    """SentencePiece's BPE: over the whole text, the pair with the highest score is merged first."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, MetaValue]) -> None:
        scores = metadata.get("tokenizer.ggml.scores")
        self._scores = [float(s) for s in scores] if isinstance(scores, list) else [0.0] * len(vocab)
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
                    heappush(queue, (-self._scores[token], left, right, merged))

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
