"""The language part of a vision model's folder: its config, and its tensors' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgekv.models.hf.checkpoint import read_json
from edgekv.models.hf.config_fields import ConfigFields

# model_type of the whole: of its language model, where text_config does not say. In all of these it is a causal
# model like any other; pictures come in as embeddings.
_WHOLES = MappingProxyType({"gemma3": "gemma3_text", "mistral3": "mistral", "kimi_k25": "kimi_k2"})
_SHARED = ("tie_word_embeddings", "quantization_config")  # fields of the whole model that rule the part
_DEFAULTS: Mapping[Any, Mapping[str, Any]] = MappingProxyType(
    {  # Gemma3TextConfig's, of which Google's folders leave out most
        "gemma3_text": {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
        }
    }
)
_PREFIXES = ("language_model.model.", "model.language_model.")  # as stored; as transformers has it in memory
_HEAD = "language_model.lm_head."
_PICTURES = ("vision_tower.", "multi_modal_projector.", "mm_projector.")


def text_fields(folder: Path) -> ConfigFields:
    """The fields of config.json that describe the language model.

    Raises:
        ModelFileError: the file is missing or malformed.
    """
    path = folder / "config.json"
    config = ConfigFields(read_json(path), path)
    if config.text("model_type") not in _WHOLES:
        return config
    text = config.inner("text_config")
    if text is None:
        config.fail("text_config", "an object")
    kind = text.text("model_type", _WHOLES[config.text("model_type")])
    shared = {name: config.values[name] for name in _SHARED if config.optional(name) is not None}
    values = {**_DEFAULTS.get(kind, {}), **text.values, **shared, "model_type": kind}
    return ConfigFields(values, path, "text_config.")


def reads_pictures(folder: Path) -> bool:
    """Whether a folder holds more than the language model; raises as `text_fields` does."""
    return read_json(folder / "config.json").get("model_type") in _WHOLES


def text_name(name: str) -> str | None:
    """A stored tensor's name in the language model by itself; None for what reads pictures."""
    if name.removeprefix("model.").startswith(_PICTURES):
        return None
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            plain = "model." + name.removeprefix(prefix)
            # transformers 5.23 saves Kimi K2.5 so: its renaming of the picture part's layers meets the text's too.
            return plain.replace("model.blocks.", "model.layers.")
    return name.removeprefix("language_model.") if name.startswith(_HEAD) else name
