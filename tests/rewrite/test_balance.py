"""Balanced scales: the same function, equal sides."""

import numpy as np

from edgekv.rewrite.balance import balanced
from edgekv.spec import MLA, RopeSpec

SPEC = MLA(3, 8, 4, 5, RopeSpec(10000.0, 6))


def student(seed: int) -> dict[str, np.ndarray]:
    """Random tensors whose channels differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (2, 30, 16),
        "kv_a": (2, 14, 16),
        "k_b": (2, 3, 8, 4),
        "v_b": (2, 3, 5, 8),
        "output": (2, 16, 15),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["kv_a"] *= np.exp(3 * rng.standard_normal((2, 14, 1))).astype(np.float32)
    return tensors


def products(t: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the model's function consists of: score and output forms that no scale can change."""
    heads = t["q"].reshape(2, 3, 10, 16).astype(np.float64)
    latent, key = t["kv_a"][:, :8].astype(np.float64), t["kv_a"][:, 8:].astype(np.float64)
    columns = t["output"].reshape(2, 16, 3, 5)
    pairs, rotated = heads[:, :, 4:].reshape(2, 3, 3, 2, 16), key.reshape(2, 3, 2, 16)
    return [
        np.einsum("lhnd,lhrn,lre->lhde", heads[:, :, :4], t["k_b"], latent),
        np.einsum("lhpad,lpbe->lhpabde", pairs, rotated),  # any rotation within a pair combines these
        np.einsum("ldhv,lhvr,lre->lhde", columns, t["v_b"], latent),
    ]


def test_the_function_is_unchanged():
    before = student(0)
    for a, b in zip(products(before), products(balanced(before, SPEC)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_both_sides_get_the_same_size():
    after = balanced(student(0), SPEC)

    def rms(x: np.ndarray, *axes: int) -> np.ndarray:
        return np.sqrt(np.square(x).mean(axes))

    heads = after["q"].reshape(2, 3, 10, 16)
    np.testing.assert_allclose(rms(heads[:, :, :4], 3), rms(after["k_b"], 2), rtol=0.05)
    np.testing.assert_allclose(rms(after["v_b"], 3), rms(after["output"].reshape(2, 16, 3, 5), 1), rtol=0.05)
    reading = np.sqrt((4 * rms(after["k_b"], 1, 3) ** 2 + 5 * rms(after["v_b"], 1, 2) ** 2) / 9)
    np.testing.assert_allclose(rms(after["kv_a"][:, :8], 2), reading, rtol=0.05)
    np.testing.assert_allclose(rms(heads[:, :, 4:], 1, 2, 3), rms(after["kv_a"][:, 8:], 1, 2), rtol=1e-5)


def test_rope_pairs_keep_their_sizes_among_each_other():
    before = student(0)["kv_a"][:, 8:]
    ratio = balanced(student(0), SPEC)["kv_a"][:, 8:] / before
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-4)


def test_unused_channels_do_no_harm():
    tensors = student(0)
    tensors["kv_a"][:, 3] = 0
    tensors["k_b"][:, :, 3] = 0
    tensors["v_b"][:, :, :, 3] = 0
    tensors["q"][:, 0] = 0
    assert all(np.isfinite(array).all() for array in balanced(tensors, SPEC).values())
