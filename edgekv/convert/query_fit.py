"""Query fit: each head's query, refitted so that its scores over the compressed rows match the original's.

The shared rope key and the latent fix what a cached row holds; how a head should read it is a least-squares
problem with a known weight: to second order, changing the scores of a softmax by d changes its output by
sum_s p_s (d_s - mean_p d) v_s, so the fit minimises the attention-weighted, centred score error

    sum_t sum_s p_ts (d_ts - sum_s' p_ts' d_ts')^2,     d_ts = score'_ts - score_ts,

over one matrix (R + P, K) per head, applied to the head's original query. Solved by conjugate gradients with a
Kronecker preconditioner, starting from the conversion's own query maps; each head stops at the step that did best on
windows held out, which may be the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekv.convert.workers import Workers
from edgekv.reference.attention import QUERY_CHUNK
from edgekv.reference.ops import apply_rope, per_head
from edgekv.source import Array
from edgekv.spec import MLA

DAMPING = 1e-4  # share of the mean curvature added to every direction


@dataclass(frozen=True)
class Probe:
    """One calibration window seen by one layer.

    queries (T, H, K): the head's queries before RoPE, on the converted model's inputs.
    rows (T, R + P): the cached rows, rope key rotated. scores and attention (H, T, T): the original's, causal.
    """

    queries: Array
    rows: Array
    scores: Array
    attention: Array


def fit_queries(
    start: Array, probes: list[Probe], held_out: list[Probe], mla: MLA, iterations: int, workers: Workers
) -> Array:
    """Refine query maps (H, R + P, K) by up to `iterations` steps; without held-out probes, by all of them."""
    left, right = _curvature(probes, mla)
    damping = np.float32(DAMPING) * _mean_eigenvalue(left) * _mean_eigenvalue(right)
    inverse_left, inverse_right = _damped_inverse(left), _damped_inverse(right)
    solution = start.copy()
    best, least = start.copy(), score_errors(start, held_out, mla, workers)
    residual = -_gradient(solution, probes, mla, workers, targets=True)
    preconditioned = inverse_left @ residual @ inverse_right
    direction = preconditioned.astype(np.float32)
    decrease = np.einsum("hij,hij->h", residual, preconditioned)
    for _ in range(iterations):
        curved = _gradient(direction, probes, mla, workers, targets=False) + damping * direction
        # Scores much larger than their spread (Qwen2.5's key biases) can round a curvature to nothing or below.
        least_curved = damping[:, 0, 0] * np.einsum("hij,hij->h", direction, direction)
        curvature = np.maximum(np.einsum("hij,hij->h", direction, curved), least_curved)
        step = decrease / np.maximum(curvature, 1e-30)
        solution += step[:, None, None] * direction
        errors = score_errors(solution, held_out, mla, workers)
        better = errors <= least
        best[better], least[better] = solution[better], errors[better]
        residual -= step[:, None, None] * curved
        preconditioned = inverse_left @ residual @ inverse_right
        previous, decrease = decrease, np.einsum("hij,hij->h", residual, preconditioned)
        share = (decrease / np.maximum(previous, 1e-30))[:, None, None]
        direction = np.asarray(preconditioned + share * direction, dtype=np.float32)
    return best


def score_errors(maps: Array, probes: list[Probe], mla: MLA, workers: Workers) -> Array:
    """The weighted score error of each head, (H,), summed over probes."""

    def share(indices: range) -> Array:
        total = np.zeros(len(maps), np.float32)
        for i in indices:
            for _, attention, error in _score_errors(maps, probes[i], mla, targets=True):
                total += np.einsum("hts,hts->h", attention * error, error)
        return total

    return np.asarray(sum(workers.each(share, len(probes)), np.zeros(len(maps), np.float32)))


def rotate_rope_part(x: Array, mla: MLA, sign: int) -> Array:
    """Rotate the last P of R + P dims of x (T, H, R + P) by +position or -position."""
    r = mla.kv_lora_rank
    positions = sign * np.arange(x.shape[0])
    rotated = apply_rope(np.ascontiguousarray(x[..., r:]), positions, mla.rope)
    return np.concatenate([x[..., :r], rotated], axis=-1)


def _score_errors(maps: Array, probe: Probe, mla: MLA, targets: bool) -> Iterator[tuple[slice, Array, Array]]:
    """Scores by the query maps, less the original's if `targets`, QUERY_CHUNK queries (t) per step.

    Yields the queries' slice, and the original's attention and the scores on the tokens (s) up to the last of them,
    both (H, t, s): most masked pairs are left out. Scores are centred by that attention, before anything is squared:
    with keys that have large biases (Qwen2.5) their mean is thousands of times their spread.
    """
    reading = rotate_rope_part(per_head(probe.queries, maps), mla, +1).swapaxes(0, 1)  # (H, T, R + P)
    for start in range(0, len(probe.rows), QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, len(probe.rows))
        error = reading[:, start:stop] @ probe.rows[:stop].T
        if targets:
            error -= probe.scores[:, start:stop, :stop]
        attention = probe.attention[:, start:stop, :stop]
        error -= np.einsum("hts,hts->ht", attention, error)[..., None]
        yield slice(start, stop), attention, error


def _gradient(maps: Array, probes: list[Probe], mla: MLA, workers: Workers, targets: bool) -> Array:
    """Gradient of half the weighted error at `maps` (H, R + P, K); without targets, the Hessian times maps."""

    def share(indices: range) -> Array:
        total = np.zeros_like(maps)
        for probe in (probes[i] for i in indices):
            pull = np.empty((len(probe.rows), *maps.shape[:2]), np.float32)  # (T, H, R + P)
            for queries, attention, error in _score_errors(maps, probe, mla, targets):
                error *= attention  # masked pairs carry no attention
                pull[queries] = (error @ probe.rows[: queries.stop]).swapaxes(0, 1)
            total += rotate_rope_part(pull, mla, -1).transpose(1, 2, 0) @ probe.queries.swapaxes(0, 1)
        return total

    n_tokens = sum(len(probe.rows) for probe in probes)
    return np.asarray(sum(workers.each(share, len(probes)), np.zeros_like(maps)) / np.float32(n_tokens))


def _curvature(probes: list[Probe], mla: MLA, stride: int = 64) -> tuple[Array, Array]:
    """Kronecker factors of the Hessian: E_t Cov_p(rows as seen from t), (H, R + P, R + P), and E[q q^T], (H, K, K).

    Every `stride`-th query is enough for a preconditioner; a window shorter than that gives its last one.
    """
    _, n_heads, k = probes[0].queries.shape
    width = probes[0].rows.shape[1]
    left = np.zeros((n_heads, width, width), np.float32)
    right = np.zeros((n_heads, k, k), np.float32)
    count = 0
    for probe in probes:
        right += probe.queries.transpose(1, 2, 0) @ probe.queries.swapaxes(0, 1)
        for t in range(min(stride, len(probe.rows)) - 1, len(probe.rows), stride):
            seen = _rotated_back(probe.rows[: t + 1], t, mla)
            weight = probe.attention[:, t, : t + 1]  # (H, S)
            # Centred first, (H, S, R + P): rounding may leave the difference of two moments indefinite.
            centered = seen - (weight @ seen)[:, None]
            left += (centered * weight[..., None]).swapaxes(1, 2) @ centered
            count += 1
    n_tokens = sum(len(probe.rows) for probe in probes)
    return left / np.float32(count), right / np.float32(n_tokens)


def _rotated_back(rows: Array, position: int, mla: MLA) -> Array:
    """Cached rows (S, R + P) as a query at `position` sees them once its own rotation is undone."""
    r = mla.kv_lora_rank
    back = np.full(len(rows), -position)
    return np.concatenate([rows[:, :r], apply_rope(rows[:, None, r:], back, mla.rope)[:, 0]], axis=-1)


def _mean_eigenvalue(matrices: Array) -> Array:
    """(H, 1, 1) of matrices (H, n, n)."""
    return np.asarray(np.trace(matrices, axis1=1, axis2=2)[:, None, None] / np.float32(matrices.shape[-1]))


def _damped_inverse(matrices: Array) -> Array:
    damped = matrices + 1e-3 * _mean_eigenvalue(matrices) * np.eye(matrices.shape[-1])
    return np.linalg.inv(damped).astype(np.float32)
