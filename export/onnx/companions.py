"""Files beside the graph that other programs read: the tokenizer, where text ends, how to run the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekv.export.tokenizer_json import write_json, write_tokenizer
from edgekv.models.onnx.folder import GRAPH
from edgekv.source import TensorSource
from edgekv.spec import GQA, AttentionSpec
from edgekv.tokenizer.tokenizer import Tokenizer


def write_companions(source: TensorSource, folder: Path) -> None:
    """Write them into `folder`; genai_config.json where onnxruntime-genai runs the graph: GQA, its heads alike."""
    spec, tokenizer = source.spec, Tokenizer.from_metadata(source.metadata)
    write_tokenizer(tokenizer, source.metadata, spec.context_length, folder, indent=1)
    heads = {_heads(layer.attention) for layer in spec.layers}
    if len(heads) == 1 and None not in heads:
        write_json(folder / "genai_config.json", genai_config(source, tokenizer), indent=1)


def _heads(attention: AttentionSpec) -> tuple[int, int, int] | None:
    """What onnxruntime-genai has to know of a layer's cache, which it wants the same in all of them; None of MLA."""
    if isinstance(attention, GQA):
        return attention.n_heads, attention.n_kv_heads, attention.head_dim
    return None


def genai_config(source: TensorSource, tokenizer: Tokenizer) -> dict[str, Any]:
    """The configuration of onnxruntime-genai (its docs: reference/config)."""
    spec = source.spec
    attention = spec.layers[0].attention
    assert isinstance(attention, GQA)
    stop = sorted(tokenizer.stop_ids)
    pad = tokenizer.eos_id if tokenizer.eos_id is not None else stop[0] if stop else 0
    return {
        "model": {
            "type": "llama",
            "bos_token_id": tokenizer.bos_id if tokenizer.bos_id is not None else pad,
            "eos_token_id": stop or [pad],
            "pad_token_id": pad,
            "context_length": spec.context_length,
            "vocab_size": spec.vocab,
            "decoder": {
                "filename": GRAPH,
                "hidden_size": spec.dim,
                "head_size": attention.head_dim,
                "num_attention_heads": attention.n_heads,
                "num_key_value_heads": attention.n_kv_heads,
                "num_hidden_layers": spec.n_layers,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": spec.context_length, "past_present_share_buffer": True},
    }
