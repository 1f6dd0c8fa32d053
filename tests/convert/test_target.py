"""Which latent serves a share of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgekv.convert.rope_key import frequency_slots
from edgekv.convert.target import SIMD_STEP, choose_rank, max_rank, obstacle, resolve_target, target_spec
from edgekv.errors import InputError
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec

SMOL = GQA(9, 3, 64, RopeSpec(100000.0, 64))
LLAMA = GQA(32, 8, 128, RopeSpec(500000.0, 128))


@pytest.mark.parametrize("gqa", [SMOL, LLAMA, GQA(32, 32, 128, RopeSpec(10000.0, 128))])
def test_never_more_than_asked_for_and_simd_friendly(gqa: GQA) -> None:
    last = 0
    for keep in np.linspace(0.17, 1, 84):
        rank, rope_dim = choose_rank(gqa, float(keep))
        kept = (rank + rope_dim) / gqa.cache_values
        assert kept <= keep + 1e-9
        assert kept > keep - (gqa.rope.dim + SIMD_STEP) / gqa.cache_values
        assert rank % SIMD_STEP == rope_dim % SIMD_STEP == 0
        assert rank <= max_rank(gqa)
        assert rank + rope_dim >= last, "more is never less"
        last = rank + rope_dim


def test_known_choices() -> None:
    assert choose_rank(SMOL, 0.5) == (128, 64)
    assert choose_rank(SMOL, 1 / 3) == (64, 64)
    assert choose_rank(SMOL, 0.25) == (64, 32)
    assert choose_rank(LLAMA, 0.125) == (128, 128)


def test_what_will_be_healed_gets_a_narrow_rope_key() -> None:
    assert choose_rank(SMOL, 0.5, healed=True) == (160, 32)
    assert choose_rank(SMOL, 1 / 3, healed=True) == (96, 32)
    assert choose_rank(LLAMA, 0.125, healed=True) == (192, 64)
    narrow = GQA(4, 2, 32, RopeSpec(10000.0, 32))  # half a head is no SIMD step
    assert choose_rank(narrow, 0.5, healed=True) == choose_rank(narrow, 0.5)
    assert resolve_target(SMOL, None, 96, None, None, healed=True).rope.dim == 32


@pytest.mark.parametrize("keep", [0, -1, 1.01, float("nan"), float("inf")])
def test_shares_that_are_none(keep: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        choose_rank(SMOL, keep)


def test_the_smallest_target_named_is_possible() -> None:
    with pytest.raises(InputError, match=r"the smallest target for this model is 0\.167"):
        choose_rank(SMOL, 0.1)
    assert choose_rank(SMOL, 0.167) == (32, 32)


def test_a_narrow_rope_key_turns_at_the_fastest_speeds() -> None:
    for rope_dim in (2, 16, 30, 64):
        mla = target_spec(SMOL, 64, rope_dim, 32, 64)
        slots = frequency_slots(SMOL.rope, mla.rope)
        assert slots.tolist() == [*range(rope_dim // 2), *[-1] * (32 - rope_dim // 2)]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0, 64, 32, 64), "--kv-lora-rank 0"),
        ((385, 64, 32, 64), "takes 1 to 384"),
        ((64, 66, 32, 64), "--rope-dim 66"),
        ((64, 31, 32, 64), "--rope-dim 31"),
        ((64, 64, 0, 64), "--nope-dim 0"),
        ((64, 64, 65, 64), "--nope-dim 65"),
        ((64, 64, 32, 0), "--value-dim 0"),
        ((64, 64, 32, 65), "--value-dim 65"),
    ],
)
def test_impossible_sizes_are_named(sizes: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        target_spec(SMOL, *sizes)


def model(*attentions: GQA | MLA, **traits: object) -> ModelSpec:
    """A model with a layer of each attention; `traits` are fields of its layers or its own."""
    of_layer = {name: traits.pop(name) for name in ("experts", "post_norms", "ffn") if name in traits}
    layers = tuple(LayerSpec(attention, 96, **of_layer) for attention in attentions)
    return ModelSpec("llama", "the model", layers, 64, 300, 512, 1e-5, True, **traits)


def test_a_plain_model_can_become_mla() -> None:
    assert obstacle(model(SMOL, SMOL)) is None


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"qk_norm": True}, "QK-norm", "cannot be absorbed"),
        ({"bias": True}, "biases on queries, keys and values", "--fold-biases"),
        ({"window": 9}, "a sliding window", "set max_position_embeddings to the window"),
        ({"softcap": 5.0}, "attention softcapping", "does not cap scores"),
        ({"rope": RopeSpec(1e4, 0)}, "layers without RoPE", "rotates in every layer"),
        (
            {"rope": RopeSpec(1e4, 64, factors=(2.0,) * 32)},
            "scaled RoPE frequencies",
            "from rope theta alone",
        ),
        ({"scale": 0.3}, "a score scale of its own", "does not compute it"),
    ],
)
def test_what_stands_in_the_way_is_named_with_a_remedy(changes: dict[str, Any], name: str, why: str) -> None:
    said = obstacle(model(replace(SMOL, **changes)))
    assert said is not None
    assert said.startswith(f"the model has {name} and cannot become MLA in llama.cpp: ")
    assert why in said
    assert "; " in said, "a remedy"


def test_traits_of_the_model_stand_in_the_way_too() -> None:
    said = obstacle(model(SMOL, embedding_scale=2.0))
    assert said is not None
    assert "scaled embeddings, residuals or logits" in said


def test_folding_takes_biases_away_and_nothing_else() -> None:
    biased = replace(SMOL, bias=True)
    assert obstacle(model(biased), fold_biases=True) is None
    said = obstacle(model(replace(biased, qk_norm=True)), fold_biases=True)
    assert said is not None
    assert "QK-norm" in said


def test_what_a_user_can_take_away_is_named_last() -> None:
    """Trimming a context to the window would be in vain where something else stays."""
    windowed = replace(SMOL, window=9)
    for attentions in ((windowed, SMOL), (windowed,)):
        assert "sliding_window to null" in str(obstacle(model(*attentions)))
    for lasting in ({"qk_norm": True}, {"softcap": 5.0}):
        said = str(obstacle(model(replace(windowed, **lasting), SMOL)))
        assert "sliding_window" not in said


def test_a_model_with_mla_is_told_apart() -> None:
    already = MLA(9, 64, 32, 64, RopeSpec(1e4, 64))
    assert obstacle(model(already)) == "the model already has MLA; convert takes a GQA or MHA model"
