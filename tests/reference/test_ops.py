"""Building blocks against their definitions in float64, and PyTorch where it has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekv.reference.ops import apply_rope, kl_rows, log_softmax, per_head, rms_norm, rope_tables, swiglu
from edgekv.spec import RopeSpec

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_rms_norm_is_torchs() -> None:
    x, weight = normal(5, 24) * 3, normal(24)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (24,), torch.from_numpy(weight), 1e-5)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected.numpy(), rtol=1e-5, atol=1e-6)
    tiny = np.full((1, 4), 1e-9, np.float32)
    assert np.allclose(rms_norm(tiny, np.ones(4, np.float32), 1e-5), 1e-9 / np.sqrt(1e-5)), "eps dominates"


def test_swiglu_is_torchs() -> None:
    x, gate, up, down = normal(5, 8), normal(12, 8), normal(12, 8), normal(8, 12)
    t = torch.from_numpy
    expected = (torch.nn.functional.silu(t(x) @ t(gate).T) * (t(x) @ t(up).T)) @ t(down).T
    np.testing.assert_allclose(swiglu(x, gate, up, down), expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_swiglu_of_huge_gates_is_finite() -> None:
    one = np.ones((1, 1), np.float32)
    assert swiglu(one, -200 * one, one, one) == pytest.approx(0)
    assert swiglu(one, 200 * one, one, one) == pytest.approx(200)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_multiplies_complex_pairs(layout: str) -> None:
    rope = RopeSpec(10000.0, 8, layout)  # type: ignore[arg-type]
    x, positions = normal(5, 3, 12), np.array([0, 1, 2, 900, 4095])
    first, second = (
        (slice(0, 8, 2), slice(1, 8, 2)) if layout == "interleaved" else (slice(0, 4), slice(4, 8))
    )
    speeds = 10000.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * positions[:, None, None] * speeds)
    out = apply_rope(x, positions, rope)
    np.testing.assert_allclose(out[..., first], turned.real, atol=1e-5)
    np.testing.assert_allclose(out[..., second], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_allclose(apply_rope(out, -positions, rope), x, atol=1e-5)


def test_rope_scores_depend_on_distance_alone() -> None:
    rope, q, k = RopeSpec(500.0, 16), normal(1, 1, 16), normal(1, 1, 16)
    scores = [
        float((apply_rope(q, np.array([at + 7]), rope) * apply_rope(k, np.array([at]), rope)).sum())
        for at in (0, 5, 1000)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)


def test_rope_tables_stay_exact_far_out() -> None:
    cos, sin = rope_tables(np.array([1_000_000]), RopeSpec(10000.0, 4))
    angle = 1_000_000 * np.array([1.0, 0.01])
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-6)


def test_per_head_is_einsum() -> None:
    x, weight = normal(6, 3, 5), normal(3, 7, 5)
    expected = np.einsum("tha,hba->thb", x.astype(np.float64), weight)
    np.testing.assert_allclose(per_head(x, weight), expected, atol=1e-5)


def test_log_softmax_is_torchs_and_takes_large_logits() -> None:
    logits = normal(4, 9) * 100
    logits[0, 0] = 1e4
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    np.testing.assert_allclose(log_softmax(logits), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_kl_rows_is_torchs() -> None:
    p, q = (log_softmax(normal(5, 40) * 3) for _ in range(2))
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(q).double(), torch.from_numpy(p).double(), reduction="none", log_target=True
    )
    np.testing.assert_allclose(kl_rows(p, q), expected.sum(-1).numpy(), rtol=1e-5)
    np.testing.assert_array_equal(kl_rows(p, p), np.zeros(5))
