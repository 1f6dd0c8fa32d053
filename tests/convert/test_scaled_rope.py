"""Llama 3's scaled RoPE for llama.cpp's deepseek2 graph: the pairs that are not scaled turn, the others stand still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.open import open_backend
from edgekv.backends.reference import ReferenceBackend
from edgekv.convert.rope_key import frequency_slots
from edgekv.convert.target import obstacle, rope_widths, target_spec, unscaled_pairs
from edgekv.errors import InputError
from edgekv.evaluate.verify import compare
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.source import LazySource, TensorSource
from edgekv.spec import GQA, RopeSpec, Yarn
from edgekv.workflows.convert import ConvertRequest, convert_model

TOKENS = np.random.default_rng(2).integers(0, 256, 200).tolist()
FACTORS = (1.0,) * 10 + (1.4, 3.3) + (8.0,) * 4  # of 16 pairs: kept, between, slow


def with_rope(source: TensorSource, rope: RopeSpec) -> LazySource:
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rope=rope)) for layer in source.spec.layers
    )
    out = LazySource(replace(source.spec, layers=layers), source.metadata)
    for name in source.names():
        out.borrow(source, name)
    return out


@pytest.fixture(scope="module")
def scaled(make_llama: Callable[..., LazySource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with a table of frequencies, as Llama 3.x has, and one KV head, of which a rope key holds everything."""
    path = tmp_path_factory.mktemp("scaled") / "llama3.gguf"
    source = with_rope(make_llama(n_kv_heads=1), RopeSpec(500000.0, 32, "interleaved", FACTORS))
    write_gguf(source, path, "f32", {}, False, lambda *_: None)
    return path


@pytest.mark.parametrize(
    ("rope", "unscaled"),
    [
        (RopeSpec(5e5, 32), 16),
        (RopeSpec(5e5, 32, "half", FACTORS), 10),
        (RopeSpec(5e5, 32, "half", (4.0,) * 16), 0),
        (RopeSpec(5e5, 32, "half", FACTORS, magnitude=1.2), 0),
        (RopeSpec(5e5, 32, "half", (), Yarn(4.0, 64)), 0),
    ],
)
def test_pairs_that_theta_alone_sets(rope: RopeSpec, unscaled: int) -> None:
    assert unscaled_pairs(rope) == unscaled


def test_the_rope_key_is_as_wide_as_those() -> None:
    """Llama 3.2 1B: 15 of 32 pairs; 3.1 8B: 29 of 64."""
    for head_dim, kept, width in ((64, 15, 32), (128, 29, 64)):
        factors = (1.0,) * kept + (32.0,) * (head_dim // 2 - kept)
        gqa = GQA(32, 8, head_dim, RopeSpec(5e5, head_dim, "interleaved", factors))
        assert rope_widths(gqa, healed=False) == (width,)
        assert target_spec(gqa, 128, width, 32, head_dim).rope.is_plain
        with pytest.raises(
            InputError, match=f"--rope-dim {head_dim} is not possible; it is even, from 2 to {width}"
        ):
            target_spec(gqa, 128, head_dim, 32, head_dim)


def test_slots_go_to_the_pairs_that_have_their_speed() -> None:
    """Llama 3.2 1B, and a plain model's narrow rope key."""
    turns = 8192 * 5e5 ** -(np.arange(32) / 32) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = 1 / (smooth + (1 - smooth) / 32)
    scaled = RopeSpec(5e5, 64, "interleaved", tuple(factors.tolist()))
    assert unscaled_pairs(scaled) == 15
    narrow = RopeSpec(5e5**0.5, 32)
    assert frequency_slots(scaled, narrow).tolist() == [
        *range(15),
        *[-1] * 17,
    ]  # the next would be off by 0.65
    assert frequency_slots(RopeSpec(5e5, 64), narrow).tolist() == [*range(16), *[-1] * 16]
    assert frequency_slots(RopeSpec(5e5, 64), RopeSpec(5e5, 64)).tolist() == list(range(32))


def test_a_model_all_of_whose_pairs_are_scaled_is_refused(scaled: Path) -> None:
    source = open_model(scaled)
    assert obstacle(source.spec, unscaled=True) is None
    assert "a deepseek2 graph takes its frequencies from rope theta alone" in str(obstacle(source.spec))
    linear = with_rope(source, RopeSpec(5e5, 32, "interleaved", (4.0,) * 16))
    assert "convert it into an ONNX folder" in str(obstacle(linear.spec, unscaled=True))


def test_the_conversion_says_what_it_loses_and_llama_cpp_runs_it(scaled: Path, tmp_path: Path) -> None:
    """With room for every key and value what is left of the loss is that of the pairs that stand still."""
    out = tmp_path / "small.gguf"
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(1).integers(32, 127, 6000).tolist()))
    request = ConvertRequest(
        scaled, out, kv_lora_rank=64, rope_dim=32, text=(text,), text_tokens=2048, weights="f32"
    )
    result = convert_model(request)
    (said,) = [warning for warning in result.warnings if "scaled RoPE" in warning]
    assert said.startswith("scaled RoPE: 10 of 16 pairs keep their frequencies")
    converted = open_model(out)
    assert converted.spec.arch == "deepseek2"
    assert converted.metadata["edgekv.unrotated_pairs"] == 6
    rope_key = converted.load("blk.0.attn_kv_a_mqa.weight")[-32:].reshape(16, -1)
    turning = np.flatnonzero(np.abs(rope_key).max(axis=1)).tolist()
    assert turning == [*range(10), 11, 13, 15]  # exact ones, and slots nearest to the speed of others
    original, small = ReferenceBackend(open_model(scaled), 256), ReferenceBackend(converted, 256)
    lost = compare(original, small, TOKENS, lambda *_: None).kl
    assert lost < 1e-2
    small.trim(0)
    engine = open_backend(out, "llama.cpp", n_ctx=256, cache_type="f32", n_threads=1)
    try:
        assert compare(small, engine, TOKENS, lambda *_: None).kl < 1e-5
    finally:
        engine.close()
