"""EdgeKV's own GGUF architecture: read back as written, and refused where it is damaged or used elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelFileError
from edgekv.models.gguf.own import SPEC_KEY, own_keys, own_spec
from edgekv.spec import GQA, MLA, Encoder, LayerSpec, ModelSpec, RopeSpec

LATENT = MLA(
    4,
    24,
    32,
    32,
    RopeSpec(1.0, 8, factors=(1.0, 2.0, 2.0, 9.0)),
    encoder=Encoder(2, 32, True, True),
    window=7,
)
WHOLE = GQA(4, 2, 32, RopeSpec(1e4, 32, "half"), softcap=5.0)
SPEC = ModelSpec(
    "edgekv", "x", (LayerSpec(LATENT, 96), LayerSpec(WHOLE, 64, "geglu", True)), 64, 300, 512, 1e-6, True
)


def written(spec: ModelSpec) -> dict[str, Any]:
    return json.loads(str(own_keys(spec)["spec"]))


def read(document: Any) -> ModelSpec:
    text = document if isinstance(document, str) else json.dumps(document)
    return own_spec({SPEC_KEY: text, "general.name": "x"}, Path("x.edgekv"))


def test_what_is_written_is_read() -> None:
    assert read(written(SPEC)) == SPEC
    scaled = replace(SPEC, embedding_scale=8.0, logit_softcap=30.0)
    assert read(written(scaled)) == scaled


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        *steps, last = path.split(".")
        place: Any = document
        for step in steps:
            place = place[int(step) if step.isdigit() else step]
        place[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dim", 0),
        ("context_length", 2**40),
        ("norm_eps", -1e-6),
        ("layers", []),
        ("layers.0.mla", None),
        ("layers.0.gqa", {"n_heads": 1}),
        ("layers.0.ffn", "tanh"),
        ("layers.0.mla.kv_lora_rank", -1),
        ("layers.0.mla.n_heads", 3),
        ("layers.0.mla.window", -1),
        ("layers.0.mla.encoder.head_dim", 31),
        ("layers.0.mla.rope.factors", [1.0]),
        ("layers.0.mla.rope.factors", [1.0, 0.0, 1.0, 1.0]),
        ("layers.0.mla.rope.dim", 7),
        ("layers.1.gqa.rope.theta", 0.0),
        ("surprise", 1),
    ],
)
def test_impossible_numbers(path: str, value: object) -> None:
    document = written(SPEC)
    change(path, value)(document)
    with pytest.raises(
        ModelFileError, match=r"x\.edgekv: its edgekv\.spec is damaged .*; convert the model again"
    ):
        read(document)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3"])
def test_no_spec(text: str) -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        read(text)
    with pytest.raises(ModelFileError, match="missing"):
        own_spec({}, Path("x.edgekv"))
