"""Folders whose parts contradict each other: transformers' choice, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.hf.config import read_spec
from edgekv.models.hf.source import HFSource
from edgekv.reference.model import ReferenceModel
from edgekv.spec import GQA

from .conftest import TOKENS, Zoo

Tensors = dict[str, np.ndarray]
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def edited(zoo: Zoo, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder with other fields in its config.json; ... leaves one out."""

    def copy(name: str, **fields: object) -> Path:
        folder = Path(shutil.copytree(zoo.folder(name), tmp_path / name))
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def assert_same(folder: Path) -> None:
    """EdgeKV's logits are those of transformers for the same folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(TOKENS)[None]).logits[0].numpy()
    reference = ReferenceModel(HFSource(folder))
    given = reference.logits(reference.hidden(TOKENS.tolist(), reference.new_cache(len(TOKENS))))
    assert np.abs(given - wanted).max() <= 1e-4


def windows(folder: Path) -> list[int]:
    return [a.window for layer in read_spec(folder).layers if isinstance(a := layer.attention, GQA)]


HEADS: dict[str, tuple[Callable[[Tensors], Tensors], bool]] = {  # what is done to the tensors, and is it tied
    "another": (lambda t: t | {HEAD: t[EMBEDDING][::-1].copy()}, False),
    "one value": (lambda t: t | {HEAD: t[EMBEDDING] + np.eye(1, 64, 63, dtype=np.float32)}, False),
    "twice": (lambda t: t | {HEAD: t[EMBEDDING].copy()}, True),
    "alone": (lambda t: {HEAD if name == EMBEDDING else name: tensor for name, tensor in t.items()}, True),
}


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@pytest.mark.parametrize("case", HEADS)
def test_head_of_a_tied_model(case: str, name: str, edited: Callable[..., Path]) -> None:
    """A merged adapter leaves two that differ under tie_word_embeddings: true."""
    folder, (edit, tied) = edited(name), HEADS[case]
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    assert HFSource(folder).spec.tied_embeddings is tied
    assert_same(folder)


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("qwen2", {"max_window_layers": 28, "layer_types": [LOCAL, GLOBAL, "attention"]}, [16, 0, 0]),
        ("qwen2", {"max_window_layers": 0, "layer_types": [GLOBAL] * 3}, [0, 0, 0]),
        ("qwen2", {"max_window_layers": 0, "layer_types": None, "sliding_window": None}, [0, 0, 0]),
        ("qwen3", {"max_window_layers": 1, "layer_types": [LOCAL, GLOBAL, GLOBAL]}, [16, 0, 0]),
        ("qwen3", {"max_window_layers": 1, "layer_types": ...}, [0, 16, 16]),
        ("mistral", {"layer_types": [GLOBAL, LOCAL, GLOBAL]}, [0, 16, 0]),
        ("mistral", {"sliding_window": None}, [0, 0, 0]),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, [4096] * 3),
        ("gemma2", {"layer_types": [GLOBAL, LOCAL, LOCAL]}, [0, 16, 16]),
    ],
)
def test_windows(name: str, fields: dict[str, Any], wanted: list[int], edited: Callable[..., Path]) -> None:
    """`layer_types` goes before every rule."""
    folder = edited(name, **{"use_sliding_window": True, "sliding_window": 16} | fields)
    assert windows(folder) == wanted
    assert_same(folder)


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("qwen2", {"use_sliding_window": False, "layer_types": [LOCAL] * 3}, UnsupportedError),
        ("phi", {"layer_types": [LOCAL, GLOBAL, LOCAL]}, UnsupportedError),
        ("gemma2", {"sliding_window": None}, ModelFileError),
        ("ministral", {"sliding_window": None}, ModelFileError),
    ],
)
def test_windows_that_contradict(
    name: str, fields: dict[str, Any], kind: type[Exception], edited: Callable[..., Path]
) -> None:
    with pytest.raises(kind, match=r"layer_types|sliding_window"):
        read_spec(edited(name, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e4, "rope_scaling": LINEAR},
        {"rope_scaling": LINEAR | {"rope_theta": 3e4}},
        {"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_scaling": LINEAR, "rope_parameters": YARN},
        {"rope_parameters": YARN, "original_max_position_embeddings": 64},
        {
            "rope_parameters": YARN | {"original_max_position_embeddings": 32},
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rotary_embeddings(fields: dict[str, Any], edited: Callable[..., Path]) -> None:
    assert_same(edited("llama2", **fields))


@pytest.mark.parametrize("outer", [..., 1e4])
def test_rotary_embeddings_that_contradict(outer: object, edited: Callable[..., Path]) -> None:
    """transformers drops the theta that stands in `rope_parameters` alone."""
    new = {"rope_type": "default", "rope_theta": 5e5}
    folder = edited("llama2", rope_theta=outer, rope_parameters=new, rope_scaling=LINEAR)
    with pytest.raises(ModelFileError, match=r"rope_theta, 500000, it would replace; write the scaling into"):
        read_spec(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LINEAR},
        {"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 3e4, "rope_local_base_freq": 5e3},
        {"rope_parameters": {GLOBAL: LINEAR, LOCAL: {"rope_type": "default"}}, "rope_local_base_freq": 5e3},
        {"rope_parameters": {GLOBAL: LINEAR}},
    ],
)
def test_rotary_embeddings_of_gemma3(fields: dict[str, Any], edited: Callable[..., Path]) -> None:
    assert_same(edited("gemma3", **fields))


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_null_is_absent(name: str, zoo: Zoo, edited: Callable[..., Path]) -> None:
    names = ("quantization_config", "rope_scaling", "_sliding_window_pattern", "partial_rotary_factor")
    folder = edited(name, **dict.fromkeys(names))
    assert read_spec(folder).layers == read_spec(zoo.folder(name)).layers
    assert HFSource(folder).names() == HFSource(zoo.folder(name)).names()


def test_whole_weights_before_the_index_of_an_older_download(edited: Callable[..., Path]) -> None:
    folder = edited("llama2")
    index = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(folder)
