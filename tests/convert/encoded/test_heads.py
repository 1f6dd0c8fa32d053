"""Heads in the order of the fit, against scores of heads as the model has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgekv.convert.encoded.heads import make_heads, plain_attention, value_bias_output
from edgekv.reference.attention import queries_and_keys
from edgekv.reference.ops import apply_rope
from edgekv.spec import GQA, RopeSpec, Yarn

RNG = np.random.default_rng(0)
H, G, K, D, T = 4, 2, 8, 12, 9
PLAIN = GQA(H, G, K, RopeSpec(100.0, K))
ROPES = {
    "interleaved": RopeSpec(100.0, K),
    "half": RopeSpec(100.0, K, "half"),
    "part": RopeSpec(100.0, 4, "half"),
    "none": RopeSpec(100.0, 0),
    "factors": RopeSpec(100.0, K, "half", (1.0, 2.0, 3.0, 4.0), None, 1.3),
    "yarn": RopeSpec(100.0, K, "interleaved", (), Yarn(4.0, 16), 1.2),
}


def weights(gqa: GQA) -> dict[str, np.ndarray]:
    sizes = {"q": H * K, "k": G * K, "v": G * K}
    w = {f"attn_{kind}.weight": RNG.standard_normal((n, D)) for kind, n in sizes.items()}
    if gqa.bias:
        w |= {f"attn_{kind}.bias": RNG.standard_normal(n) for kind, n in sizes.items()}
    if gqa.qk_norm:
        w |= {f"attn_{kind}_norm.weight": RNG.standard_normal(K) for kind in "qk"}
    return {name: array.astype(np.float32) for name, array in w.items()}


def scores(queries: np.ndarray, keys: np.ndarray, rope: RopeSpec) -> np.ndarray:
    positions = np.arange(len(queries))
    queries, keys = (apply_rope(heads, positions, rope) for heads in (queries, keys))
    return np.einsum("thk,shk->hts", queries, np.repeat(keys, H // G, axis=1))


@pytest.mark.parametrize("traits", [{}, {"bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scores_are_the_models(rope: RopeSpec, traits: dict[str, bool]) -> None:
    gqa = replace(PLAIN, rope=rope, **traits)
    w, x = weights(gqa), RNG.standard_normal((T, D)).astype(np.float32)
    plain, order = plain_attention(gqa)
    queries, made = make_heads(x, w, gqa, order, 1e-6)
    expected = scores(*queries_and_keys(x, w, gqa, H, 1e-6), gqa.rope)
    keys, values = np.split(made, 2, axis=1)
    found = scores(queries, keys.reshape(T, G, K), plain.rope)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values, x @ w["attn_v.weight"].T, rtol=1e-5)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_readers_of_the_heads_as_they_are(rope: RopeSpec) -> None:
    _, order = plain_attention(replace(PLAIN, rope=rope))
    reader, heads = RNG.standard_normal((5, K)), RNG.standard_normal((T, G, K)).astype(np.float32)
    np.testing.assert_allclose(
        heads @ order.undo(reader).T, order.apply(heads) @ reader.T, rtol=1e-4, atol=1e-5
    )


def test_a_bias_of_values_adds_the_same_to_every_output() -> None:
    gqa = replace(PLAIN, bias=True)
    w = weights(gqa) | {"attn_output.weight": RNG.standard_normal((D, H * K)).astype(np.float32)}
    attention = RNG.dirichlet(np.ones(T), (H, T))
    values = (RNG.standard_normal((T, D)) @ w["attn_v.weight"].T + w["attn_v.bias"]).reshape(T, G, K)

    def outputs(values: np.ndarray) -> np.ndarray:
        mixed = np.einsum("hts,shk->thk", attention, np.repeat(values, H // G, axis=1))
        return mixed.reshape(T, -1) @ w["attn_output.weight"].T

    without = outputs(values - w["attn_v.bias"].reshape(G, K))
    np.testing.assert_allclose(without + value_bias_output(w, gqa), outputs(values), rtol=1e-4, atol=1e-4)
    assert not value_bias_output(w, PLAIN).any()
