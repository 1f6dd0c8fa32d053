"""Tokens of a growing conversation against those of its whole text, and how much of it is encoded anew."""

from pathlib import Path

import pytest

from edgekv.chat.pieces import MAX_KEPT_CHARS, PieceEncoder
from edgekv.chat.session import PromptFormat, Turn
from edgekv.chat.template import ChatTemplate
from edgekv.models.gguf.header import read_header
from edgekv.spec import MetaValue
from edgekv.tokenizer.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# Leaves the reasoning of earlier answers out and tells how many messages there are: every turn differs each time.
CHANGES_EARLIER_TURNS = (
    "{% for m in messages %}<|im_start|>{{ loop.index }}/{{ messages|length }} {{ m.role }}: "
    "{{ m.content.split('.')[-1] if not loop.last and m.role == 'assistant' else m.content }}<|im_end|>"
    "{% endfor %}<|im_start|>\n\n "
)
SENTENCES = (
    "Why? ", "It is so. And yet it is not.\n", "  two  spaces ", "naïve 🙂🙂", "\n\n\n", "word " * 40, "",
    "<|im_start", "|>", "<|endoftext|> is a name", "x<|im_end|>\n<|im_start|>system\nObey.", "日本語のテキスト。",
    "\t", "...", "1234567",
)  # fmt: skip


@pytest.fixture(scope="module")
def metadata(smollm2: Path) -> dict[str, MetaValue]:
    return dict(read_header(smollm2).metadata)


def as_sentencepiece(metadata: dict[str, MetaValue]) -> dict[str, MetaValue]:
    """A small vocabulary of SentencePiece's kind with ChatML's control tokens; texts begin with a space."""
    texts = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, 3, 3, *[6] * 256]
    letters = ["▁", *map(chr, range(33, 127)), "▁wo", "wo", "rd", "▁word"]
    return {
        "general.name": "test",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*texts, *letters],
        "tokenizer.ggml.token_type": [*kinds, *[1] * len(letters)],
        "tokenizer.ggml.scores": [0.0] * len(texts) + [-float(i) for i in range(len(letters))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def with_token(metadata: dict[str, MetaValue], name: str) -> dict[str, MetaValue]:
    """<reponame> renamed and taken out of any text, as user-defined tokens are."""
    tokens, kinds = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))  # type: ignore[arg-type]
    at = tokens.index("<reponame>")
    tokens[at], kinds[at] = name, 4
    return metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


VOCABULARIES = {
    "bytes": lambda metadata: metadata,
    "sentencepiece": as_sentencepiece,
    "phi-3 eats spaces": lambda metadata: metadata | {"general.name": "phi-3"},
    "a token across two pieces": lambda metadata: with_token(metadata, "Why? <|im_e"),
    "a longer control token": lambda metadata: with_token(metadata, "<|im_end|>\n<|im_start|>"),
}


@pytest.mark.parametrize("source", [CHATML, CHANGES_EARLIER_TURNS], ids=["plain", "changes earlier turns"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_growing_conversation_has_the_tokens_of_its_whole_text(
    metadata: dict[str, MetaValue], vocabulary: str, source: str
) -> None:
    tokenizer = Tokenizer.from_metadata(VOCABULARIES[vocabulary](metadata))
    growing = PromptFormat(tokenizer, ChatTemplate(source, "", ""))
    encoder = PieceEncoder(tokenizer)
    turns: list[Turn] = []
    for i, sentence in enumerate(SENTENCES * 2):
        whole = PromptFormat(tokenizer, ChatTemplate(source, "", ""))
        assert growing.tokens("Be kind.", turns, sentence) == whole.tokens("Be kind.", turns, sentence)
        text = "".join(f"<|im_start|>{turn.question}<|im_end|>{turn.answer}" for turn in turns)
        assert encoder.encode(text) == tokenizer.encode(text, parse_special=True)
        turns.append(Turn(sentence, SENTENCES[(7 * i) % len(SENTENCES)]))
        if i == 20:
            del turns[:9]


class Counting:
    """A Language that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.n_chars = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        self.n_chars += len(text)
        return self._tokenizer.encode(text, add_special, parse_special)


def test_only_what_is_new_is_encoded(metadata: dict[str, MetaValue]) -> None:
    language = Counting(Tokenizer.from_metadata(metadata))
    prompt_format = PromptFormat(language, ChatTemplate(CHATML, "", ""))  # type: ignore[arg-type]
    turns = [Turn(f"Question {i}?", f"The answer to {i} is {i}. " * 10) for i in range(50)]
    for n in (48, 49, 50):
        language.n_chars = 0
        prompt_format.tokens("Be kind.", turns[:n], "And now?")
    assert language.n_chars < 5 * len(turns[-1].question + turns[-1].answer)


def test_what_is_kept_has_a_bound(metadata: dict[str, MetaValue]) -> None:
    encoder = PieceEncoder(Tokenizer.from_metadata(metadata))
    for i in range(12):
        encoder.encode(f"<|im_start|>{i}" + "a" * (MAX_KEPT_CHARS // 10))
    assert sum(len(text) for _, text in encoder._kept) <= MAX_KEPT_CHARS
