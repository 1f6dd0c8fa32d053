"""The simulated cache rounding against gguf-py's quantizers."""

from typing import get_args

import gguf
import numpy as np
import pytest
import torch

from edgekv.heal.cache_rounding import ROUND_TRIPS, straight_through
from edgekv.heal.recipe import CacheType

TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ROUND_TRIPS}


def test_all_cache_types_of_a_recipe_are_simulated():
    assert get_args(CacheType) == ("f16", *ROUND_TRIPS)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_round_trip_is_bit_for_bit_that_of_gguf_py(name, scale):
    rows = (np.random.default_rng(0).standard_normal((500, 96)) * scale).astype(np.float32)
    rows[0] = 0  # a block of zeros has scale 0
    rows[1, :32] = np.float32(scale)  # all equal
    rows[2, 5] *= 1000  # an outlier
    kind = TYPES[name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    np.testing.assert_array_equal(ROUND_TRIPS[name](torch.from_numpy(rows)).numpy(), expected)


def test_halves_round_away_from_zero_as_in_c():
    rows = np.zeros((1, 32), np.float32)
    rows[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    np.testing.assert_array_equal(
        ROUND_TRIPS["q8_0"](torch.from_numpy(rows)).numpy()[0, :5], [127, 1, 2, -1, -3]
    )


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0"])
def test_the_gradient_passes_unchanged(name):
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.randn(4, 64)
    rounded = straight_through(x, name)
    assert not torch.equal(rounded, x)
    (rounded * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_f16_simulates_nothing():
    x = torch.randn(4, 64)
    assert straight_through(x, "f16") is x
