"""Division of cached values over layers: a step goes where it saves most, and to no layer more than it caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgekv.convert.encoded.division import divide, share_steps
from edgekv.source import LazySource, scaled, with_tensors

WINDOWS = np.random.default_rng(1).integers(0, 256, (4, 96))


def test_a_step_goes_to_the_curve_that_falls_most() -> None:
    assert share_steps([[9.0, 5.0, 0.0], [3.0, 2.9, 2.8], [1.0, 0.9, 0.0]], 7) == [3, 1, 3]


def test_several_steps_at_once_count_by_what_each_saves() -> None:
    """The first curve's next step saves nothing, and the two after it 8."""
    assert share_steps([[8.0, 8.0, 0.0], [3.0, 2.0, 1.0]], 4) == [3, 1]


def test_all_are_given_and_none_gets_more_than_all() -> None:
    curves = np.sort(np.random.default_rng(0).random((5, 8)))[:, ::-1].tolist()
    for n_steps in range(10, 41):
        steps = share_steps(curves, n_steps, least=2)
        assert sum(steps) == n_steps
        assert min(steps) >= 2
        assert max(steps) <= 8


def test_a_layer_whose_error_is_large_beside_its_stream_gets_more(
    make_llama: Callable[..., LazySource],
) -> None:
    source = make_llama()
    name = "token_embd.weight"
    small_stream = with_tensors(source, {name: scaled(source, name, 0.01)})
    widths = (96,) * source.spec.n_layers
    divided = divide(small_stream, widths, None, WINDOWS, lambda _: None)
    assert sum(divided) == sum(widths)
    assert divided[0] == max(divided) > 96


def test_layers_with_windows_share_among_themselves(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama()
    layers = list(source.spec.layers)
    layers[0] = replace(layers[0], attention=replace(layers[0].attention, window=16))
    windowed = with_tensors(source, {}, replace(source.spec, layers=tuple(layers)))
    divided = divide(windowed, (96,) * len(layers), None, WINDOWS, lambda _: None)
    assert divided[0] == 96
    assert sum(divided) == 96 * len(layers)


def test_no_layer_loses_a_frequency_that_all_would_have(make_llama: Callable[..., LazySource]) -> None:
    source = make_llama()
    least = 2 * source.spec.layers[0].attention.head_dim
    assert min(divide(source, (96,) * source.spec.n_layers, None, WINDOWS, lambda _: None)) >= least == 64
