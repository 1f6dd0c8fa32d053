"""Norm trick: a linear latent under an RMSNorm that every MLA graph applies.

DeepSeek's graph normalises the latent (arXiv 2405.04434, section 2.1.2); a converted model has no such norm.
Scaled far below sqrt(eps), the latent c passes RMSNorm unchanged in shape:

    s*c / sqrt(mean((s*c)^2) + eps) * w  =  c * s*w/sqrt(eps) * (1 - O(s^2 mean(c^2) / eps))

so w = sqrt(eps)/s gives c back, linear to s^2 mean(c^2) / (2 eps). The scaled rows need the exponent range of
F32 or BF16: f16 and block-quantized scales underflow.
"""

from __future__ import annotations

import numpy as np

from edgekv.source import Array

SMALLNESS = 1e-4  # s^2 * mean(c^2) / eps: the norm's departure from linear is half of this
FOLDED_BELOW = 2.0**-10  # folded weights end far below this, trained ones far above


def fold_norm(encoder: Array, mean_square: float, eps: float) -> tuple[Array, Array]:
    """A latent encoder (R, D), scaled, and the norm weight (R,) that undoes the scale.

    `mean_square` is the mean of c^2 over tokens and channels, c = x @ encoder.T.
    """
    scale = np.sqrt(SMALLNESS * eps / mean_square)
    weight = np.full(encoder.shape[0], np.sqrt(eps) / scale, np.float32)
    return (encoder * np.float32(scale)).astype(np.float32), weight


def unfold_norm(rows: Array, norm_weight: Array, eps: float) -> Array:
    """The linear encoder (R, D) that a folded pair stands for; inverse of `fold_norm`."""
    return (rows * (norm_weight / np.float32(np.sqrt(eps)))[:, None]).astype(np.float32)


def is_folded(rows: Array) -> bool:
    """Whether latent rows (R, D) come from `fold_norm`: they are so small that formats with f16 scales lose them."""
    return bool(0 < np.abs(rows).max() < FOLDED_BELOW)
