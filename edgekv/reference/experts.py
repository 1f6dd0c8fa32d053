"""Mixture-of-experts feed-forward of the reference model, one expert at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgekv.reference.ops import swiglu
from edgekv.source import Array
from edgekv.spec import Experts

MIN_WEIGHT_SUM = 6.103515625e-5  # as llama.cpp clamps it: the smallest normal f16


def expert_feed_forward(x: Array, w: Mapping[str, Array], experts: Experts) -> Array:
    """Routed and shared experts on normed x (T, D) (arXiv 2401.06066, eq. 9-11; 2412.19437, eq. 12-16)."""
    chosen, weights = route(x, w, experts)  # (T, used) each
    gate, up, down = (w[f"ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))  # (E, F, D), (E, D, F)
    out = np.zeros_like(x)
    if experts.shared:
        out += swiglu(x, *(w[f"ffn_{kind}_shexp.weight"] for kind in ("gate", "up", "down")))
    for expert in np.unique(chosen):
        tokens, slots = np.nonzero(chosen == expert)
        given = swiglu(x[tokens], gate[expert], up[expert], down[expert])
        out[tokens] += weights[tokens, slots][:, None] * given
    return out


def route(x: Array, w: Mapping[str, Array], experts: Experts) -> tuple[NDArray[np.int64], Array]:
    """Each token's experts and what they count for: (T, used) and (T, used)."""
    scores: Array = np.asarray(x @ w["ffn_gate_inp.weight"].T, dtype=np.float32)
    if experts.gating == "sigmoid":
        probabilities = np.asarray(1.0 / (1.0 + np.exp(-scores)), dtype=np.float32)
    else:
        scores -= scores.max(axis=-1, keepdims=True)
        probabilities = np.exp(scores)
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
    preference: Array = probabilities + w["exp_probs_b.bias"] if experts.bias else probabilities
    if experts.groups > 1:
        preference = _keep_best_groups(preference, experts)
    chosen = np.argsort(-preference, axis=-1, kind="stable")[:, : experts.used]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    if experts.norm_weights:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.float32(MIN_WEIGHT_SUM))
    return chosen, np.asarray(weights * np.float32(experts.scale), dtype=np.float32)


def _keep_best_groups(preference: Array, experts: Experts) -> Array:
    """-inf for every expert outside the groups that score best (arXiv 2412.19437, section 2.1.2)."""
    grouped = preference.reshape(len(preference), experts.groups, -1)
    score = np.sort(grouped, axis=-1)[..., -experts.group_score_of :].sum(axis=-1)
    kept = np.argsort(-score, axis=-1, kind="stable")[:, : experts.used_groups]
    mask = np.full(score.shape, -np.inf, np.float32)
    np.put_along_axis(mask, kept, 0.0, axis=-1)
    return np.asarray((grouped + mask[..., None]).reshape(preference.shape), dtype=np.float32)
