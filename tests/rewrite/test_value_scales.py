"""Scales of the values: the same model, and one that four bits hold."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest

from edgekv.reference.model import ReferenceModel
from edgekv.rewrite.value_scales import value_gains, with_balanced_values
from edgekv.source import LazySource, TensorSource

H, V, R, D = 2, 32, 16, 48


def test_gains_are_powers_of_two_and_even_out_both_sides() -> None:
    rng = np.random.default_rng(0)
    v_b = rng.standard_normal((H, V, R)).astype(np.float32)
    output = (rng.standard_normal((D, H * V)) * np.logspace(0, -4, H * V)).astype(np.float32)
    output[:, 5] = 0
    gains = value_gains(v_b, output)
    assert (np.exp2(np.round(np.log2(gains))) == gains).all()
    assert gains[0, 5] == 1
    values = np.linalg.norm(v_b * gains[:, :, None], axis=-1).reshape(-1)
    readers = np.linalg.norm(output / gains.reshape(-1), axis=0)
    ratio = np.delete(values, 5) / np.delete(readers, 5)
    assert (ratio > 0.49).all()
    assert (ratio < 2.01).all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_same_and_its_output_rounds_better(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource], tied: bool
) -> None:
    plain = make_mla(make_llama(tied=tied), 32, 32)
    source = LazySource(plain.spec, plain.metadata)
    strength = np.logspace(0, 4, plain.shape("blk.0.attn_v_b.weight")[1]).astype(np.float32)
    for name in plain.names():
        array = plain.load(name)
        if name.endswith("attn_v_b.weight"):
            array = array * strength[:, None]
        if name.endswith("attn_output.weight"):
            array = array / np.tile(strength, array.shape[1] // len(strength))
        source.add_array(name, array)
    balanced = with_balanced_values(source)
    assert balanced.names() == source.names()
    np.testing.assert_allclose(logits(balanced), logits(source), atol=1e-4)
    assert weighted_loss(balanced) < 0.5 * weighted_loss(source)


def logits(source: TensorSource) -> np.ndarray:
    model = ReferenceModel(source)
    return model.logits(model.hidden([1, 5, 9, 2], model.new_cache(4)))


def weighted_loss(source: TensorSource) -> float:
    """Relative error of attn_output @ v_b when attn_output is rounded to q4_0."""
    v_b = source.load("blk.0.attn_v_b.weight")
    output = source.load("blk.0.attn_output.weight")
    kind = gguf.GGMLQuantizationType.Q4_0
    rounded = gguf.quants.dequantize(gguf.quants.quantize(output, kind), kind)
    heads = output.shape[0], *v_b.shape[:2]

    def product(rows: np.ndarray) -> np.ndarray:
        return np.einsum("dhv,hvr->dhr", rows.reshape(heads), v_b)

    whole = product(output)
    return float(np.square(product(rounded) - whole).sum() / np.square(whole).sum())
