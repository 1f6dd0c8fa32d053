"""Special tokens and chat templates of a folder's tokenizer, and the proof that llama.cpp gives its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from edgekv.errors import EdgeKVError, ModelFileError, UnsupportedError
from edgekv.spec import MetaValue
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.tokenizer.vocab import END_TEXTS

PROBE = (
    "Hello world, it's 3 apples or 1234567 PEARS: don't, DON'T, we'LL! \n\n  \n\t two\ttabs   three spaces \r\n"
    "café naïve Übermut, да, Ελλάδα 東京都に行く。你好世界 안녕하세요 สวัสดี हिन्दी 🙂👍🏽 $5.00+7% #tag @you "
    "snake_case camelCase HTTPServer /path/to/file.py <html> {json: [1, 22, 333, 4444]} ...!!! x^2 != y ~ `z`\n"
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
    try:
        return gguf.SpecialVocab(folder, load_merges=merges, n_vocab=n_vocab)
    except (ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ModelFileError(
            f"{folder}: tokenizer.json or tokenizer_config.json cannot be read: {error!r}; download them again"
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
    return _more_ends(folder, texts, pairs) | pairs | _templates(special.chat_template)


def _more_ends(folder: Path, texts: list[str], pairs: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
    """Ends of text besides the first, which GGUF has keys for as ends of a turn and of a message.

    Those that llama.cpp knows by their text need none; GLM's <|user|> and <|observation|> do.
    """
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            given = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ends += [i for i in given if isinstance(i, int)] if isinstance(given, list) else []
    first = pairs.get(gguf.Keys.Tokenizer.EOS_ID)
    known = [i for i in dict.fromkeys(ends) if 0 <= i < len(texts) and i != first]
    unknown = [i for i in known if texts[i] not in END_TEXTS]
    return dict(zip((gguf.Keys.Tokenizer.EOT_ID, gguf.Keys.Tokenizer.EOM_ID), unknown, strict=False))


def _templates(template: Any) -> dict[str, MetaValue]:
    if not isinstance(template, list):
        return {gguf.Keys.Tokenizer.CHAT_TEMPLATE: template} if isinstance(template, str) else {}
    named = {str(entry["name"]): str(entry["template"]) for entry in template}
    pairs: dict[str, MetaValue] = {
        gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in named.items()
    }
    pairs[gguf.Keys.Tokenizer.CHAT_TEMPLATES] = list(named)
    if default := named.get("default") or next(iter(named.values()), None):
        pairs[gguf.Keys.Tokenizer.CHAT_TEMPLATE] = default
    return pairs


def prove(pairs: Mapping[str, MetaValue], wanted: list[int], path: Path, text: str = PROBE) -> None:
    """Raise unless EdgeKV's tokenizer, which gives llama.cpp's tokens, gives those of the folder for `text`.

    Raises:
        UnsupportedError: it does not.
        ModelFileError: the vocabulary contradicts itself.
    """
    try:
        given = Tokenizer.from_metadata(pairs).encode(text)
    except EdgeKVError as error:
        raise type(error)(f"{path}: {error}") from None
    if given != wanted:
        at = next((i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), -1)
        raise UnsupportedError(
            f"{path}: llama.cpp would give other tokens, first in place {at}; choose a model that llama.cpp knows"
        )
