"""The basis of a cached row: the same function, and less lost where the cache is quantized."""

import gguf
import numpy as np
import pytest

from edgekv.reference.ops import apply_rope
from edgekv.rewrite.cache_basis import in_cache_basis, latent_basis, rope_factors
from edgekv.spec import MLA, RopeSpec

MLA_SPEC = MLA(3, 64, 16, 24, RopeSpec(10000.0, 64))
DIM, TOKENS = 96, 700
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def random_layer(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A layer whose latent channels and rope pairs differ by orders of magnitude, and inputs with a mean."""
    rng = np.random.default_rng(seed)
    h, n, p, r, v = 3, 16, 64, 64, 24
    layer = {
        "q": rng.standard_normal((h * (n + p), DIM)) * 0.1,
        "kv_a": rng.standard_normal((r + p, DIM)) * 0.1,
        "k_b": rng.standard_normal((h, r, n)) * 0.1,
        "v_b": rng.standard_normal((h, v, r)) * 0.1,
        "output": rng.standard_normal((DIM, h * v)) * 0.1,
    }
    layer["kv_a"][:r] *= np.exp(1.5 * rng.standard_normal((r, 1)))
    layer["kv_a"][r:] *= np.exp(np.repeat(rng.standard_normal((p // 2, 1)), 2, axis=0))
    inputs = rng.standard_normal((TOKENS, DIM)) + 0.5
    return {k: x.astype(np.float32) for k, x in layer.items()}, inputs.astype(np.float32)


def outputs(layer: dict[str, np.ndarray], inputs: np.ndarray, quantized: bool) -> np.ndarray:
    """Causal attention of the first 200 tokens, its cached rows through gguf-py's q4_0 if asked for."""
    x, r = inputs[:200].astype(np.float64), MLA_SPEC.kv_lora_rank
    positions = np.arange(len(x))
    rows = (x @ layer["kv_a"].T)[:, None]
    rows[..., r:] = apply_rope(rows[..., r:], positions, MLA_SPEC.rope)
    if quantized:
        rows = gguf.quants.dequantize(gguf.quants.quantize(rows.astype(np.float32), Q4_0), Q4_0)
    q = (x @ layer["q"].T).reshape(len(x), 3, -1)
    rotated = apply_rope(q[..., 16:], positions, MLA_SPEC.rope)
    out = 0.0
    for h in range(3):
        read = np.concatenate([q[:, h, :16] @ layer["k_b"][h].T, rotated[:, h]], axis=-1)
        scores = np.where(np.tri(len(x), dtype=bool), read @ rows[:, 0].T * 80**-0.5, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True)) @ rows[:, 0, :r] @ layer["v_b"][h].T
        out = out + mixed @ layer["output"].reshape(DIM, 3, 24)[:, h].T
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_the_function_stays_and_q4_0_loses_less(seed):
    layer, inputs = random_layer(seed)
    changed = in_cache_basis(layer, inputs, MLA_SPEC)
    exact = outputs(layer, inputs, quantized=False)
    np.testing.assert_allclose(
        outputs(changed, inputs, quantized=False), exact, atol=2e-4 * np.abs(exact).max()
    )
    lost = np.mean((outputs(layer, inputs, quantized=True) - exact) ** 2)
    still_lost = np.mean((outputs(changed, inputs, quantized=True) - exact) ** 2)
    assert still_lost < 0.7 * lost, (still_lost, lost)


def test_the_latent_basis_spreads_size_and_sensitivity_evenly():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 48, 48)) * np.exp(rng.standard_normal((2, 48, 1)))
    moment, sensitivity = a @ a.T, b @ b.T
    basis, inverse = latent_basis(moment, sensitivity)
    np.testing.assert_allclose(basis @ inverse, np.eye(48), atol=1e-6)
    sizes = np.diag(basis @ moment @ basis.T)
    costs = np.diag(inverse.T @ sensitivity @ inverse)
    least = np.sqrt(np.maximum(np.linalg.eigvals(moment @ sensitivity).real, 0)).sum() ** 2 / 48
    assert sizes.mean() * costs.sum() == pytest.approx(least, rel=0.02)
    assert sizes.sum() == pytest.approx(np.trace(moment))
    assert sizes.max() / sizes.min() < 8 < np.diag(moment).max() / np.diag(moment).min()


def test_a_channel_that_carries_nothing_does_no_harm():
    layer, inputs = random_layer(2)
    layer["kv_a"][5] = 0
    layer["k_b"][:, 5] = 0
    layer["v_b"][:, :, 5] = 0
    layer["kv_a"][64:66] = 0
    assert all(np.isfinite(x).all() for x in in_cache_basis(layer, inputs, MLA_SPEC).values())


def test_a_pair_that_dwarfs_its_block_is_made_smaller():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((500, 32)) + 1j * rng.standard_normal((500, 32))
    keys[:, 3] = 20 + keys[:, 3]
    factors = np.abs(rope_factors(keys, np.ones(32)))
    assert factors[3] < 0.6 * np.delete(factors, 3).min()


def test_what_a_few_tokens_did_not_show_is_not_blown_up():
    layer, inputs = random_layer(3)
    changed = in_cache_basis(layer, inputs[:20], MLA_SPEC)
    before, after = (np.linalg.norm(x["kv_a"][:64] @ inputs[100:].T, axis=1).max() for x in (layer, changed))
    assert after < 100 * before
