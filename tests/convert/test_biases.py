"""Biases folded into weights, and RoPE pairs reordered, against the models they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.reference import ReferenceBackend
from edgekv.convert.biases import fold_biases
from edgekv.convert.layers import METHODS, LayerLoss, convert, convertible_attention
from edgekv.convert.output_fit import Moments
from edgekv.convert.target import target_spec
from edgekv.errors import UnsupportedError
from edgekv.evaluate.verify import compare
from edgekv.rewrite.rope_pairs import with_interleaved_pairs
from edgekv.source import LazySource, TensorSource
from edgekv.spec import GQA, RopeSpec

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 100).tolist()
WINDOWS = RNG.integers(0, 256, (24, 64))
D, H, G, K = 24, 2, 1, 8


def with_attention(source: TensorSource, biases: float = 0.0, **changes: object) -> LazySource:
    """The source with another attention spec; `biases` is their scale, 0 for none."""
    layers = source.spec.layers
    attention = layers[0].attention
    assert isinstance(attention, GQA)
    changed = replace(attention, bias=bool(biases), **changes)
    out = LazySource(
        replace(source.spec, layers=tuple(replace(layer, attention=changed) for layer in layers)), {}
    )
    for name in source.names():
        out.add_array(name, source.load(name))
        if biases and name.rpartition(".attn_")[2] in ("q.weight", "k.weight", "v.weight"):
            bias = biases * np.random.default_rng(len(name)).standard_normal(source.shape(name)[0])
            out.add_array(name.replace("weight", "bias"), bias.astype(np.float32))
    return out


def kl(a: TensorSource, b: TensorSource) -> float:
    return compare(ReferenceBackend(a, 128), ReferenceBackend(b, 128), TOKENS, lambda *_: None).kl


def test_reordered_pairs_change_nothing(make_llama: Callable[..., LazySource]) -> None:
    plain = make_llama()
    attention = plain.spec.layers[0].attention
    assert isinstance(attention, GQA)
    halves = with_attention(plain, 0.5, rope=replace(attention.rope, layout="half"))
    again = with_interleaved_pairs(halves)
    rope = again.spec.layers[0].attention.rope
    assert rope.layout == "interleaved"
    assert kl(plain, halves) > 1e-3  # the layout matters
    assert kl(halves, again) < 1e-7
    assert with_interleaved_pairs(plain) is plain


def moments(inputs: np.ndarray) -> Moments:
    return Moments(inputs.T @ inputs, inputs.sum(axis=0)[:, None], len(inputs))


def layer(scale: float) -> dict[str, np.ndarray]:
    shapes = {"q": H * K, "k": G * K, "v": G * K}
    weights = {f"attn_{kind}.weight": RNG.standard_normal((n, D)) for kind, n in shapes.items()}
    return weights | {f"attn_{kind}.bias": scale * RNG.standard_normal(n) for kind, n in shapes.items()}


def test_a_constant_direction_carries_the_biases() -> None:
    """Inputs whose first channel is always 3: everything but keys that hardly turn is reproduced."""
    gqa = GQA(H, G, K, RopeSpec(1e9, K), bias=True)  # pairs turn by 1, 6e-3, 3e-5, 2e-7 a token
    inputs = RNG.standard_normal((4000, D))
    inputs[:, 0] = 3
    w = layer(5.0)
    folded, error = fold_biases(w, gqa, moments(inputs[:3000]), moments(inputs[3000:]))
    assert error < 5e-3
    assert not [name for name in folded if "bias" in name]
    for kind in ("q", "v"):
        difference = inputs @ (folded[f"attn_{kind}.weight"] - w[f"attn_{kind}.weight"]).T
        np.testing.assert_allclose(difference, np.tile(w[f"attn_{kind}.bias"], (4000, 1)), atol=0.1)
    keys = inputs @ (folded["attn_k.weight"] - w["attn_k.weight"]).T
    np.testing.assert_allclose(keys[:, :4], np.tile(w["attn_k.bias"][:4], (4000, 1)), atol=0.1)
    assert not keys[:, 6:].any()  # the slowest pair's


def test_the_error_is_that_of_the_constant() -> None:
    inputs = RNG.standard_normal((4000, D))
    inputs[:, 0] += 2  # u = 2 / 5 on this channel is the best: E(1 - u x)^2 = 1 - 4 / 5
    gqa = GQA(H, G, K, RopeSpec(1e4, K), bias=True)
    _, error = fold_biases(layer(1.0), gqa, moments(inputs[:3000]), moments(inputs[3000:]))
    assert error == pytest.approx(np.sqrt(0.2), rel=0.05)


def test_a_biased_model_is_converted_where_asked(
    make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    """At full rank what is left is the error of the folded biases; without them it would be far more."""
    source = with_attention(make_llama(n_kv_heads=1), 0.3)
    with pytest.raises(UnsupportedError, match=r"biases .* --fold-biases"):
        convertible_attention(source.spec)
    gqa = convertible_attention(source.spec, fold_biases=True)
    losses: list[LayerLoss] = []
    target = target_spec(gqa, 64, 32, 32, gqa.head_dim)
    out = convert(source, target, WINDOWS, tmp_path, METHODS["edgekv"], losses.append)
    assert all(0 < loss.bias_error <= 1 for loss in losses)
    assert not [name for name in out.names() if name.endswith(".bias")]
    dropped = with_attention(source, 0.0)
    assert kl(source, out) < kl(source, dropped)
