"""Pre-tokenizers: how text is cut into words before byte-pair merging (`tokenizer.ggml.pre`), as llama.cpp does.

The expressions are those of src/llama-vocab.cpp (llm_tokenizer_bpe), rewritten where llama.cpp's regex
engine means something else than Oniguruma, which Hugging Face's `tokenizers` uses:
  - its categories are Unicode 15.1's and Oniguruma's are 16.0's: younger code points belong to none;
  - `(?=[\\p{L}])([^a-z])` there is `[\\p{L}&&[^a-z]]` here;
  - a range of characters never covers whitespace there: all of it is seen as a vertical tab.
Proved in tests/tokenizer/test_bpe.py for every code point and every name in PRE_TYPES.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers


def _members(spans: str) -> str:
    """Members of a character class from spans of hexadecimal code points."""
    pairs = (span.split("-") for span in spans.split())
    return "".join(rf"\x{{{pair[0]}}}-\x{{{pair[-1]}}}" for pair in pairs)


_UNICODE_16 = _members(  # letters, numbers, marks, punctuation and symbols that it added
    "897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D8F "
    "10EC2-10EFC 11380-113E2 116D0-116E3 11BC0-11BF9 11F5A 13460-143FA 16100-16139 16D40-16D79 18CFF "
    "1CC00-1CEB3 1E5D0-1E5FF 1F8B2-1F8C1 1FA89-1FA8F 1FABE 1FAC6 1FADC-1FADF 1FAE9 1FBCB-1FBEF"
)
_DEEPSEEK_LETTERS = _members(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 "
    "1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC "
    "1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 "
    "213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B "
    "A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_HAN = r"[一-龥\x{800}-一가-\x{D7FF}&&\S]+"
_KANA_AND_HAN = r"[一-龥\x{3040}-ゟ゠-ヿ]+"

_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _words(
    numbers: str, head: str = _CONTRACTION + "|", letters: str = r"\p{L}", after: str = r"[\r\n]*"
) -> str:
    """Llama 3's expression and those made from it: words with one character before them, numbers, the rest."""
    other = letters if letters != r"\p{L}" else ""
    return (
        rf"{head}[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{numbers}| ?[^\s\p{{L}}{other}\p{{N}}]+{after}|" + _LINES
    )


def _cased(numbers: str, tail: str = "") -> str:
    """GPT-4o's expression and those made from it: a word ends before a capital; only a-z and A-Z have case here."""
    upper, lower, before = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{tail}|{before}{upper}+{lower}*{tail}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES
    )


@dataclass(frozen=True)
class PreType:
    """How one kind of vocabulary wants its text: expressions applied one after another, and defaults.

    `ignore_merges`: a word that is a token stays whole. `add_bos`: what holds when no key says so.
    `has_bos`: false if there is no beginning-of-text token unless a key names it.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    has_bos: bool = True


def _types() -> Iterable[tuple[str, PreType]]:
    """(Names, separated by spaces; type): tokenizer_pre in llama_vocab::impl::load."""
    llama3, qwen2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
    deepseek_v3 = (
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES
    )
    yield "default", PreType((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
    yield (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreType((llama3,), ignore_merges=True, add_bos=True),
    )
    yield "dbrx smaug-bpe", PreType((llama3,))
    yield "chatglm-bpe", PreType((llama3,), has_bos=False)
    yield "glm4 glm5", PreType((llama3,), ignore_merges=True, has_bos=False)
    yield "minicpm5", PreType((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True)
    yield "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreType((qwen2,))
    yield "qwen35", PreType((_words(r"\p{N}", letters=r"\p{L}\p{M}"),))
    yield "ufakzeka", PreType((_words(r"\p{N}", head=""),))
    yield "seed-coder", PreType((qwen2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),))
    yield "bailingmoe bailingmoe2 llada-moe", PreType((qwen2.replace(r"|\s*[\r\n]+|", r"|\s*[\r\n]|"),))
    yield (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert",
        PreType((_GPT2,)),
    )
    yield "exaone4 jina-v1-en jina-v2-code roberta-bpe", PreType((_GPT2,))
    yield "mpt olmo jais trillion granite-docling", PreType((_GPT2,))
    yield (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreType((r"\p{N}", _GPT2)),
    )
    yield "falcon", PreType((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"))
    yield (
        "deepseek-llm",
        PreType(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                r"\s?[!-/:-~！-／：-～‘-‟\x{3001}-。]+",
                r"\s+\z",
                _DEEPSEEK_HAN,
                r"\p{N}+",
            )
        ),
    )
    yield "deepseek-coder", PreType((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"))
    yield "deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreType((r"\p{N}{1,3}", _KANA_AND_HAN, deepseek_v3))
    yield "poro-chat bloom gpt3-finnish", PreType((_BLOOM,))
    yield "viking", PreType((_BLOOM, r"\p{N}"))
    yield "tekken", PreType((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)
    yield "gpt-4o llama4 kanana2 talkie minimax-m2", PreType((_cased(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))


PRE_TYPES: Mapping[str, PreType] = MappingProxyType(
    {name: kind for names, kind in _types() for name in names.split()}
)


def oniguruma(expression: str) -> str:
    """An expression with its categories narrowed to Unicode 15.1."""
    for category in "LNMPS":
        expression = expression.replace(rf"\p{{{category}}}", rf"[\p{{{category}}}&&[^{_UNICODE_16}]]")
    return expression


def splitters(kind: PreType) -> list[pre_tokenizers.PreTokenizer]:
    """The expressions as pre-tokenizers: matches and what lies between them become words."""
    return [pre_tokenizers.Split(Regex(oniguruma(expression)), "isolated") for expression in kind.expressions]
