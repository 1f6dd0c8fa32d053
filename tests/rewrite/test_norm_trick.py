"""RMSNorm of a folded latent is the latent itself."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.reference.ops import rms_norm
from edgekv.rewrite.norm_trick import fold_norm, unfold_norm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_linear_to_one_in_ten_thousand(eps: float, scale: float) -> None:
    x = RNG.standard_normal((200, 32)).astype(np.float32)
    encoder = (scale * RNG.standard_normal((12, 32))).astype(np.float32)
    latent = x @ encoder.T
    folded, weight = fold_norm(encoder, float(np.square(latent).mean()), eps)
    given = rms_norm(x @ folded.T, weight, eps)
    error = np.linalg.norm(given - latent, axis=1) / np.linalg.norm(latent, axis=1)
    assert np.sqrt(np.square(error).mean()) < 1e-4
    assert error.max() < 5e-4, "even a token with several times the mean energy"


def test_unfold_is_the_inverse() -> None:
    encoder = RNG.standard_normal((12, 32)).astype(np.float32)
    folded, weight = fold_norm(encoder, 3.0, 1e-5)
    np.testing.assert_allclose(unfold_norm(folded, weight, 1e-5), encoder, rtol=1e-5)
