"""Special tokens and chat templates of a folder's tokenizer, and the proof that llama.cpp gives its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from edgekv.errors import EdgeKVError, ModelFileError, UnsupportedError
from edgekv.models.hf.checkpoint import folder_name, read_json
from edgekv.spec import MetaValue
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.tokenizer.vocab import END_TEXTS

PROBE = (
    "Hello world, it's 3 apples or 1234567 PEARS: don't, DON'T, we'LL! \n\n  \n\t two\ttabs   three spaces \r\n"
    "café naïve Übermut, да, Ελλάδα 東京都に行く。你好世界 안녕하세요 สวัสดี हिन्दी 🙂👍🏽 $5.00+7% #tag @you "
    "snake_case camelCase HTTPServer /path/to/file.py <html> {json: [1, 22, 333, 4444]} ...!!! x^2 != y ~ `z`\n"
)
_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
ELSEWHERE = (
    "choose a model without, or take the GGUF that llama.cpp's convert_hf_to_gguf.py writes all the same"
)


def looks_special(text: str) -> bool:
    """Control tokens that some models do not mark; the same rule as in llama.cpp's converter."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    named = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in named or any(text.startswith(a) and text.endswith(b) for a, b in ends)


def read_special(folder: Path, n_vocab: int, merges: bool) -> gguf.SpecialVocab:
    """gguf-py's reading of a folder.

    Raises:
        ModelFileError: a file is malformed.
    """
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # says more of what is wrong
    try:
        return gguf.SpecialVocab(folder, load_merges=merges, n_vocab=n_vocab)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{folder}: tokenizer.json, tokenizer_config.json or the chat template cannot be read: {error!r}; download "
            "them again"
        ) from None


def special_pairs(
    folder: Path, texts: list[str], special: gguf.SpecialVocab, adds: Mapping[str, bool]
) -> dict[str, MetaValue]:
    """Special token ids, whether text begins and ends with one, and chat templates.

    Args:
        adds: whether a "bos" and "eos" is added, where tokenizer_config.json does not say.
    """
    pairs: dict[str, MetaValue] = {}
    for role, token in special.special_token_ids.items():
        if key := getattr(gguf.Keys.Tokenizer, f"{role.upper()}_ID", None):
            pairs[key] = token
    for role in ("bos", "eos"):
        added = special.add_special_token.get(role, adds[role])
        pairs[f"tokenizer.ggml.add_{role}_token"] = bool(added) and role in special.special_token_ids
    return _ends(folder, texts, pairs) | pairs | _template_pairs(_templates(folder))


def ends_of_text(folder: Path, n_vocab: int) -> list[int]:
    """Tokens that end a text: generation_config.json's, or else config.json's, a list or one number.

    Raises:
        ModelFileError: a file is malformed.
    """
    for name in ("generation_config.json", "config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        inner = values.get("text_config")
        given = values.get("eos_token_id")
        if given is None and isinstance(inner, dict):
            given = inner.get("eos_token_id")
        if given is None:
            continue
        ends = given if isinstance(given, list) else [given]
        if any(type(i) is not int for i in ends):
            raise ModelFileError(
                f"{folder / name}: eos_token_id is {given!r}, a token's number or a list of them was expected; "
                "download it again"
            )
        return [i for i in dict.fromkeys(ends) if 0 <= i < n_vocab]
    return []


def _ends(folder: Path, texts: list[str], pairs: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
    """Ends of text besides the tokenizer's own, which GGUF has keys for as ends of a turn and of a message.

    Those that llama.cpp knows by their text need none; GLM's <|user|> and <|observation|> do.
    """
    keys = gguf.Keys.Tokenizer
    ends = ends_of_text(folder, len(texts))
    first = pairs.get(keys.EOS_ID, ends[0] if ends else None)
    unknown = [i for i in ends if i != first and texts[i] not in END_TEXTS]
    more: dict[str, MetaValue] = dict(zip((keys.EOT_ID, keys.EOM_ID), unknown, strict=False))
    return more if first is None else more | {keys.EOS_ID: first}


def _templates(folder: Path) -> dict[str, str]:
    """Chat templates by name: of files of their own, which transformers reads first, or tokenizer_config.json."""
    try:
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        found = {path.stem: path.read_text(encoding="utf-8") for path in more}
        if (folder / "chat_template.jinja").is_file():
            found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if found:
            return found
        for name in ("tokenizer_config.json", "chat_template.json"):
            given = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
            if given is not None:
                return _named_templates(given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{folder}: the chat template cannot be read: {error!r}; download its file again"
        ) from None
    return {}


def _named_templates(given: Any) -> dict[str, str]:
    """Templates by name, of a text, a list of names and texts, or an object of texts; ValueError for another."""
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    named = given if isinstance(given, dict) else {"default": given}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError("it is no text")
    return named


def _template_pairs(named: Mapping[str, str]) -> dict[str, MetaValue]:
    """Keys of the templates; one for tools or documents is never the default, as transformers has it too."""
    default = named.get("default")
    pairs: dict[str, MetaValue] = {} if default is None else {gguf.Keys.Tokenizer.CHAT_TEMPLATE: default}
    if list(named) in ([], ["default"]):
        return pairs
    pairs[gguf.Keys.Tokenizer.CHAT_TEMPLATES] = list(named)
    return pairs | {
        gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in named.items()
    }


def proved(
    pairs: dict[str, MetaValue], wanted: list[int], path: Path, swallowing: frozenset[int], text: str = PROBE
) -> dict[str, MetaValue]:
    """The pairs, if EdgeKV's tokenizer, which does as llama.cpp, does with them as the folder's.

    Args:
        wanted: the folder's tokens of `text`.
        swallowing: tokens that swallow the white space behind them. llama.cpp has no key for them, but takes
            Phi-3's for such in a model of that name, which the pairs then get, or lose.

    Raises:
        UnsupportedError: tokens or ends of text would differ.
        ModelFileError: the vocabulary contradicts itself.
    """
    try:
        name, tokenizer = _named(pairs, path, swallowing)
        given = tokenizer.encode(text)
    except EdgeKVError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from None
    if given != wanted:
        at = next((i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), -1)
        raise UnsupportedError(
            f"{path}: llama.cpp would give other tokens, first in place {at}; choose a model that llama.cpp knows"
        )
    if lost := set(ends_of_text(path.parent, len(tokenizer))) - tokenizer.stop_ids:
        raise UnsupportedError(
            f"{path.parent}: more ends of text (eos_token_id) than a GGUF has keys for, llama.cpp would not stop at "
            f"token {min(lost)}; leave those that the model does not write out of generation_config.json"
        )
    return pairs if name == folder_name(path.parent) else pairs | {"general.name": name}


def _named(pairs: Mapping[str, MetaValue], path: Path, swallowing: frozenset[int]) -> tuple[str, Tokenizer]:
    """A name by which llama.cpp's control tokens swallow white space as the folder's do, and the tokenizer.

    llama.cpp (llama_vocab::impl::load) does not load a model named Phi-3 without all of _PHI3's tokens.
    """
    name = folder_name(path.parent)
    other = re.sub("(?i)(phi)-?3", r"\1_3", name)
    texts = pairs["tokenizer.ggml.tokens"]
    assert isinstance(texts, list)
    for candidate in (name, f"{name} (Phi-3)", other) if set(texts) >= _PHI3 else (other,):
        tokenizer = Tokenizer.from_metadata({**pairs, "general.name": candidate})
        if tokenizer.eats_space == swallowing:
            return candidate, tokenizer
    raise UnsupportedError(
        f"{path}: some of its added tokens swallow the white space behind them (rstrip), which llama.cpp does for "
        f"Phi-3's alone: tokens would differ; {ELSEWHERE}"
    )


def refuse_rules(path: Path, text: str, lstrip: bool, single_word: bool) -> None:
    """Raise UnsupportedError for an added token that is found in a text by rules that llama.cpp does not have."""
    if lstrip or single_word:
        rule = "swallows the white space before it (lstrip)" if lstrip else "stands alone only (single_word)"
        raise UnsupportedError(
            f"{path}: the added token {text!r} {rule}, in llama.cpp it does not: tokens would differ; {ELSEWHERE}"
        )
