"""`edgekv inspect`: figures against gguf-py and plain arithmetic."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

Result = subprocess.CompletedProcess[str]


def test_a_real_model_by_hand(edgekv: Callable[..., Result], smollm2: Path) -> None:
    found = json.loads(edgekv("inspect", smollm2, "--json").stdout)
    tensors = gguf.GGUFReader(smollm2).tensors
    assert found["parameters"] == sum(int(t.n_elements) for t in tensors)
    mix: dict[str, int] = {}
    for tensor in tensors:
        mix[tensor.tensor_type.name] = mix.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    assert found["quantization"] == mix
    assert (found["architecture"], found["attention"], found["n_layers"]) == ("llama", "GQA", 30)
    assert found["shape"] == {"n_kv_heads": 3, "head_dim": 64, "rope_theta": 100000.0}
    cache = found["cache"]
    assert cache["values_per_token_per_layer"] == 384
    assert cache["bytes_per_token"] == {
        **{"f16": 23040, "q8_0": 12240, "q8_0/q4_0": 9360, "q5_0/q4_0": 7200, "q4_0": 6480}
    }
    assert cache["bytes"]["f16"] == {"2048": 47185920, "8192": 188743680, "32768": 754974720}


def test_what_it_could_become_keeps_what_it_promises(edgekv: Callable[..., Result], smollm2: Path) -> None:
    offers = json.loads(edgekv("inspect", smollm2, "--json").stdout)["could_become"]
    assert {(o["kv_lora_rank"], o["rope_dim"]) for o in offers} >= {(128, 64), (64, 64)}
    for offer in offers:
        assert offer["kept"] <= offer["target"]
        assert offer["kept"] == (offer["kv_lora_rank"] + offer["rope_dim"]) / 384
        assert offer["kv_lora_rank"] % 32 == offer["rope_dim"] % 32 == 0


def test_a_converted_model(edgekv: Callable[..., Result], tiny_mla: Path) -> None:
    found = json.loads(edgekv("inspect", tiny_mla, "--json").stdout)
    assert (found["architecture"], found["attention"]) == ("deepseek2", "MLA")
    assert found["shape"] == {
        "kv_lora_rank": 32, "rope_dim": 32, "nope_dim": 16, "value_dim": 32, "rope_theta": 10000.0,
    }  # fmt: skip
    assert found["cache"]["bytes_per_token"]["f16"] == 3 * 64 * 2
    assert list(found["cache"]["bytes_per_token"]) == ["f16", "q8_0", "q4_0"], "K and V are one row"
    assert found["could_become"] == []
    assert found["made_by"]["edgekv.version"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mla"])
def test_the_table_says_the_same(
    edgekv: Callable[..., Result], name: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    found = json.loads(edgekv("inspect", path, "--json").stdout)
    shown = edgekv("inspect", path).stdout
    assert f"{found['architecture']}, {found['attention']}" in shown
    for size in found["cache"]["bytes_per_token"].values():
        assert f"{size:,}" in shown


def test_layers_with_a_window_stop_growing(edgekv: Callable[..., Result], tiny_gemma: Path) -> None:
    found = json.loads(edgekv("inspect", tiny_gemma, "--json").stdout)["cache"]
    layer = 2 * 2 * 32 * 2  # bytes of one token: K and V of two heads in f16
    assert found["bytes_per_token"]["f16"] == 3 * layer
    assert (found["window"], found["layers_with_window"]) == (64, 2)
    small = found["bytes"]["f16"]["2048"] - 2048 * layer
    assert small in (
        2 * 768 * layer,
        2 * 256 * layer,
    )  # beside a micro-batch of 512 or, on a small machine, 128
    assert found["bytes"]["f16"]["32768"] == 32768 * layer + small
    assert (
        "2 of 3 layers keep little more than their window of 64 tokens"
        in edgekv("inspect", tiny_gemma).stdout
    )
