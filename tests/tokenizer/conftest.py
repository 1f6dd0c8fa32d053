"""The tokenizer beside llama.cpp's, a megabyte of everything to compare them on, and made-up vocabularies."""

from __future__ import annotations

import ctypes
import pydoc_data.topics
import random
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest

from edgekv.backends.llama_cpp.library import take_log
from edgekv.models.gguf.header import read_header
from edgekv.tokenizer.tokenizer import Tokenizer

SCRIPTS = {
    "Latin": [*range(0xC0, 0x250)],
    "Greek": [*range(0x391, 0x3CA)],
    "Cyrillic": [*range(0x410, 0x450)],
    "Hebrew": [*range(0x5D0, 0x5EB), 0x5B0, 0x5B4],
    "Arabic": [*range(0x621, 0x64B), 0x64B, 0x660, 0x669, 0x60C],
    "Devanagari": [*range(0x900, 0x970)],
    "Thai": [*range(0xE01, 0xE3B), 0xE50],
    "Kana": [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)],
    "Hangul": [*range(0xAC00, 0xAC80), 0x1100, 0x1161],
    "Chinese": [*range(0x4E00, 0x4F00), *range(0x3001, 0x3003), 0xFF0C, 0x9FA5, 0x9FA6, 0x3400, 0x20000],
    "Symbols": [*range(0x2190, 0x21FF), *range(0x20A0, 0x20C1), *range(0x2200, 0x2300)],
    "Numbers": [*range(0x2160, 0x2189), *range(0x2460, 0x249C), 0xB2, 0xBD, 0x3007, 0x1D7D8],
    "Emoji": [*range(0x1F600, 0x1F650), *range(0x1F1E6, 0x1F200), 0x1F3FB, 0x200D, 0xFE0F, 0x2764],
    "Spaces": [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, 0x2003, 0x2028, 0x202F, 0x205F, 0x3000, 0x200B],
    "Controls": [*range(32), *range(127, 160), 0xAD, 0xFEFF, 0xFFFD, 0xFFFE, 0xE000, 0x10FFFF],
}
ENGLISH_BITS = (
    *(
        "I'm",
        "don't",
        "WE'LL",
        "they've",
        "he'd",
        "YOU'RE",
        "it's",
        "'s",
        "'T",
        "''",
        "O'Neil",
        "rock'n'roll",
    ),
    *(
        "HTMLParser",
        "iPhone",
        "snake_case",
        "camelCaseWord",
        "ALLCAPS",
        "naïve",
        "Straße",
        "e\u0301",
        "ſ",
        "ı",
    ),
)
CODE_BITS = (
    *(
        "    ",
        "\t",
        "\n\n",
        "\r\n",
        "\n    ",
        "  \n",
        ");\n",
        "{\n",
        "}\n\n",
        "//",
        "/* */",
        "=>",
        "!=",
        "::",
    ),
    *(
        "->",
        "[i]",
        "0x1F",
        "1e-5",
        "</p>",
        "&amp;",
        "\\n",
        "#!",
        "--",
        "...",
        "?!",
        "\u2019s",
        "```",
        "$",
        "~",
    ),
)
SPECIAL_BITS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start",
        "<repo_name>",
        "<|im_end|><|im_end|>",
        "<s>",
    ),
    *("</s>", "<file_sep>", "<|fim_prefix|>", "<empty_output>", "[INST]", "<unk>", "<0x0A>", "<|", "|>", "<"),
)


def bit(rng: random.Random) -> str:
    """A few characters of one kind."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(ENGLISH_BITS) + rng.choice(("", " ", ", ", ". "))
    if kind == 1:
        return rng.choice(CODE_BITS)
    if kind == 2:
        return rng.choice(SPECIAL_BITS)
    if kind == 3:
        number = rng.choice(
            (rng.randrange(10), rng.randrange(10**4), rng.randrange(10**18), rng.random() * 1e6)
        )
        return rng.choice((f"{number}", f" {number}", f"-{number},", f"{number}%", f"2024-0{number}"))
    if kind == 4:
        return chr(rng.choice(SCRIPTS["Spaces"])) * rng.choice((1, 1, 2, 3, 17))
    if kind == 5:
        return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
    letters = SCRIPTS[rng.choice(list(SCRIPTS))]
    return "".join(chr(rng.choice(letters)) for _ in range(rng.choice((1, 2, 3, 8)))) + rng.choice(("", " "))


@cache
def make_text(n_bytes: int, seed: int = 1) -> str:
    """English, code and a mixture of all scripts, spaces, controls and special tokens; a third each."""
    rng = random.Random(seed)
    english = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    code = Path(textwrap.__file__).read_text() + Path(random.__file__).read_text()
    parts, sizes, total = {"english": english, "code": code}, {"english": 0, "code": 0}, 0
    pieces = []
    while total < n_bytes:
        name = rng.choice(("english", "code", "mixture"))
        if name == "mixture":
            piece = "".join(bit(rng) for _ in range(rng.randrange(1, 60)))
        else:
            start, n = sizes[name] % len(parts[name]), rng.randrange(1, 800)
            piece = parts[name][start : start + n]
            sizes[name] += n
        pieces.append(piece)
        total += len(piece.encode())
    return "".join(pieces)


@cache
def make_characters() -> str:
    """Characters at which the category changes, the newest ones, and a sample; each among a-1-space-'."""
    codes = set(range(0x500))
    for code in range(1, 0x110000):
        if unicodedata.category(chr(code)) != unicodedata.category(chr(code - 1)):
            codes |= {code - 1, code}
    for first, last in ((0x1C89, 0x1C8A), (0x10D40, 0x10D8F), (0x13460, 0x13470), (0x2EBF0, 0x2EBF8)):
        codes |= set(range(first, last + 1))
    codes |= set(random.Random(2).sample(range(0x110000), 2000))
    chars = [chr(code) for code in sorted(codes) if not 0xD800 <= code < 0xE000]
    return "".join(f"a{c}b1{c}{c}2 {c}'s.{c}\n" for c in chars)


class LlamaVocab:
    """llama.cpp's vocabulary of a file."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, "llama.cpp refused the file"
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.size = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
        assert n >= 0
        return ids[:n]

    def piece(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        assert n >= 0
        return buffer.raw[:n]

    def stop_ids(self) -> set[int]:
        return {i for i in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, i)}

    def role(self, name: str) -> int | None:
        token = getattr(llama_cpp, f"llama_vocab_{name}")(self._vocab)
        return None if token == -1 else int(token)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


def first_difference(ours: list[int], theirs: list[int], tokenizer: Tokenizer) -> str:
    """Where two lists of tokens part, as text."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    before, mine, other = (
        [tokenizer.token_bytes(i) for i in ids]
        for ids in (ours[at - 8 : at], ours[at : at + 8], theirs[at : at + 8])
    )
    return f"token {at}: after {before} ours {mine} theirs {other}"


@contextmanager
def compare(path: Path) -> Iterator[tuple[Tokenizer, LlamaVocab, Callable[..., int]]]:
    """Both tokenizers of a file, and a check that they agree on a text, which gives the number of tokens."""
    tokenizer, vocab = Tokenizer.from_metadata(read_header(path).metadata), LlamaVocab(path)

    def check(text: str, **options: bool) -> int:
        ours, theirs = tokenizer.encode(text, **options), vocab.encode(text, **options)
        assert ours == theirs, first_difference(ours, theirs, tokenizer)
        return len(ours)

    try:
        yield tokenizer, vocab, check
    finally:
        vocab.close()


def make_vocab(path: Path, model: str, tokens: list[str], types: list[int], **keys: Any) -> Path:
    """A GGUF of nothing but a vocabulary; `keys` follow `tokenizer.ggml.`, but `name` is the model's."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(keys.pop("name", "test"))
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        adders = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
        }
        adders[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """llama.cpp's log is kept, not printed: it warns of nearly every vocabulary below."""
    take_log()


@pytest.fixture(scope="session")
def mixed_text() -> Callable[..., str]:
    """`mixed_text(n_bytes, seed)`: text of at least that many bytes."""
    return make_text


@pytest.fixture(scope="session")
def characters() -> str:
    """Every kind of character among letters, digits, spaces and apostrophes."""
    return make_characters()


@pytest.fixture(scope="session")
def compared() -> Callable[[Path], Any]:
    """`with compared(path) as (tokenizer, vocab, check)`: both tokenizers of a GGUF."""
    return compare


@pytest.fixture(scope="session")
def write_vocab() -> Callable[..., Path]:
    """`write_vocab(path, model, tokens, types, **keys)`: a GGUF of nothing but a vocabulary."""
    return make_vocab
