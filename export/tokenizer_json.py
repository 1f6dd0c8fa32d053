"""Tokenizer of a GGUF as the files that transformers reads: tokenizer.json and two configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as HFTokenizer

from edgekv.spec import Metadata
from edgekv.tokenizer.bpe import SPACE, SentencePiece, merge_lines, word_splitter
from edgekv.tokenizer.pre_tokenize import PRE_TYPES, PreType
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.tokenizer.vocab import CONTROL, UNKNOWN, USER_DEFINED, Vocab, read_vocab


def write_tokenizer(
    ours: Tokenizer, metadata: Metadata, context_length: int, folder: Path, indent: int
) -> tuple[str, ...]:
    """Write generation_config.json, tokenizer_config.json and tokenizer.json; returns their names."""
    write_json(folder / "generation_config.json", generation_config(ours, metadata), indent)
    write_json(folder / "tokenizer_config.json", tokenizer_config(ours, metadata, context_length), indent)
    (folder / "tokenizer.json").write_text(tokenizer_json(ours, metadata), encoding="utf-8")
    return "generation_config.json", "tokenizer_config.json", "tokenizer.json"


def write_json(path: Path, document: dict[str, Any], indent: int) -> None:
    """Write a document as indented JSON."""
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_json(ours: Tokenizer, metadata: Metadata) -> str:
    """tokenizer.json: encodes as edgekv.tokenizer.tokenizer does, with special tokens always parsed.

    Args:
        ours: Tokenizer.from_metadata(metadata), which has checked everything.
    """
    if metadata["tokenizer.ggml.model"] == "gpt2":
        pre = PRE_TYPES[str(metadata.get("tokenizer.ggml.pre", "default"))]
        vocab = read_vocab(metadata, default_bos=pre.has_bos)
        tokenizer = _byte_level(vocab, metadata, pre)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocab = read_vocab(metadata)
        tokenizer = _sentence_piece(vocab, metadata)
    _add_special(tokenizer, vocab, ours)
    _wrap(tokenizer, vocab, ours)
    return tokenizer.to_str()


def tokenizer_config(ours: Tokenizer, metadata: Metadata, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens' names and the chat template."""
    vocab = read_vocab(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    padding, unknown = (metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("padding", "unknown"))
    roles = {"bos": ours.bos_id, "eos": ours.eos_id, "pad": padding, "unk": unknown}
    for role, i in roles.items():
        if isinstance(i, int) and 0 <= i < len(vocab):
            config[f"{role}_token"] = vocab.texts[i]
    if ours.chat_template is not None:
        config["chat_template"] = ours.chat_template
    return config


def generation_config(ours: Tokenizer, metadata: Metadata) -> dict[str, Any]:
    """generation_config.json: where generation starts and all the tokens that end it."""
    stops = sorted(ours.stop_ids, key=lambda i: (i != ours.eos_id, i))
    config: dict[str, Any] = {"bos_token_id": ours.bos_id, "eos_token_id": stops}
    if isinstance(padding := metadata.get("tokenizer.ggml.padding_token_id"), int):
        config["pad_token_id"] = padding
    return config


def _byte_level(vocab: Vocab, metadata: Metadata, kind: PreType) -> HFTokenizer:
    # A merge is "left right", and of two equal ones the first counts.
    pairs = dict.fromkeys(tuple(str(line).split(" ", 1)) for line in merge_lines(metadata))
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    model = models.BPE(vocab=dict(vocab.ids), merges=merges, ignore_merges=kind.ignore_merges)
    tokenizer = HFTokenizer(model)
    tokenizer.pre_tokenizer = word_splitter(vocab, kind)
    return tokenizer


def _sentence_piece(vocab: Vocab, metadata: Metadata) -> HFTokenizer:
    """SentencePiece's BPE by score as merges by rank: every split of a token, the best score first.

    The way of transformers' own converter (convert_slow_tokenizer.py, generate_merges).
    """
    model = SentencePiece(vocab, metadata)
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(vocab.texts, key=lambda text: -model.scores[vocab.ids[text]])
        for cut in range(1, len(text))
        if text[:cut] in vocab.ids and text[cut:] in vocab.ids
    ]
    unknown = next((text for i, text in enumerate(vocab.texts) if vocab.attributes[i] & UNKNOWN), None)
    tokenizer = HFTokenizer(
        models.BPE(vocab=dict(vocab.ids), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    pieces: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def _add_special(tokenizer: HFTokenizer, vocab: Vocab, ours: Tokenizer) -> None:
    """Tokens that are found in the text before anything else; they keep the ids they have."""
    special = [i for i, bits in enumerate(vocab.attributes) if bits & (CONTROL | USER_DEFINED | UNKNOWN)]
    tokenizer.add_tokens(
        [
            AddedToken(
                vocab.texts[i],
                rstrip=i in ours.eats_space,
                normalized=False,
                special=bool(vocab.attributes[i] & (CONTROL | UNKNOWN)),
            )
            for i in special
        ]
    )


def _wrap(tokenizer: HFTokenizer, vocab: Vocab, ours: Tokenizer) -> None:
    """The beginning- and end-of-text tokens that the model wants around a text."""
    around = ours.encode("", add_special=True)
    bos = [vocab.texts[i] for i in around if i == ours.bos_id][:1]
    eos = [vocab.texts[i] for i in around[len(bos) :] if i == ours.eos_id]
    if not bos and not eos:
        return
    single = [*bos, "$A", *eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single) if all(" " not in part for part in single) else single,
        pair=[*bos, "$A", *eos, *(f"{text}:1" for text in bos), "$B:1", *(f"{text}:1" for text in eos)],
        special_tokens=[(text, vocab.ids[text]) for text in dict.fromkeys([*bos, *eos])],
    )
