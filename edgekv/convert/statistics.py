"""Statistics of one layer over all calibration windows, on all cores, and the step on to the next layer.

Hidden states are (n + m, T, D) for n windows of calibration text and m of other kinds, which are never fitted, and
exist once: `advance` overwrites and returns the array passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from edgekv.convert.biases import fold_biases
from edgekv.convert.methods import LayerMaps, LayerStats, Method, complex_joint
from edgekv.convert.one_window import (
    QueryRows,
    View,
    attended_moment,
    attention_view,
    feed_forward,
    gqa_mixed,
    mixed_latents,
)
from edgekv.convert.output_fit import HELD_OUT, Moments
from edgekv.convert.workers import Workers
from edgekv.reference.model import BlockWeights
from edgekv.reference.ops import rms_norm
from edgekv.rewrite.linalg import Matrix
from edgekv.source import Array
from edgekv.spec import GQA, MLA, ModelSpec

MAX_PROBES = 16  # windows whose attention matrices are looked at


@dataclass(frozen=True)
class FitRecipe:
    """How a layer is fitted: the method that finds its maps, and what is refitted behind them.

    sequential: layers are fitted on the inputs that the converted layers before them give, not the original's.
    """

    method: Method = complex_joint
    query_iterations: int = 4
    refit_output: bool = True
    sequential: bool = True


@dataclass(frozen=True)
class Job:
    """Inputs of a conversion that are the same for every layer. n_elsewhere: windows of text of other kinds."""

    spec: ModelSpec
    gqa: GQA
    target: MLA
    recipe: FitRecipe
    n_windows: int
    n_elsewhere: int
    workers: Workers

    @property
    def n_fitted(self) -> int:
        """Windows before the held-out ones."""
        return self.n_windows - round(self.n_windows * HELD_OUT)

    @property
    def judged(self) -> range:
        """Windows on which errors are measured: the held-out ones, all if there are none."""
        return range(self.n_fitted if self.n_fitted < self.n_windows else 0, self.n_windows)

    @property
    def elsewhere(self) -> range:
        """Windows of text of other kinds, behind those of the calibration text."""
        return range(self.n_windows, self.n_windows + self.n_elsewhere)

    @property
    def probed(self) -> set[int]:
        """Windows whose attention is looked at, some of each part."""
        n_held = min(round(MAX_PROBES * HELD_OUT), self.n_windows - self.n_fitted)
        n_fitted = min(MAX_PROBES - n_held, self.n_fitted)
        return {*range(n_fitted), *range(self.n_fitted, self.n_fitted + n_held), *self.elsewhere}

    def inputs(self, w: BlockWeights, x: Array) -> Array:
        """The attention's inputs: hidden states x (..., D), normed."""
        return rms_norm(x, w["attn_norm.weight"], self.spec.norm_eps)


@dataclass(frozen=True)
class Seen:
    """The original layer's statistics on the calibration text, and its activations on all windows.

    queries (n + m, T, H, K) before RoPE, mixed (n + m, T, H * K) values; energy: the sum of |output|^2 over judged
    tokens, energy_elsewhere over text of other kinds.
    """

    stats: LayerStats
    queries: Array
    mixed: Array
    energy: float
    energy_elsewhere: float


def without_biases(w: BlockWeights, job: Job, states: Array) -> tuple[BlockWeights, float]:
    """The layer with its biases folded into its weights, and the relative error of that."""
    d = job.spec.dim

    def share(windows: range) -> Moments:
        gram, total = np.zeros((d, d), np.float32), np.zeros((d, 1), np.float32)
        for i in windows:
            inputs = job.inputs(w, states[i])
            gram += inputs.T @ inputs
            total[:, 0] += inputs.sum(axis=0)
        n_tokens = len(windows) * states.shape[1]
        return Moments(gram.astype(np.float64), total.astype(np.float64), n_tokens)

    seen, held_out, _ = _parts(job, share, Moments(np.zeros((d, d)), np.zeros((d, 1)), 0))
    return fold_biases(w, job.gqa, seen, held_out)


def _parts(job: Job, share: Callable[[range], Moments], nothing: Moments) -> tuple[Moments, Moments, Moments]:
    """The moments of the fitted windows, of the held-out ones, and of text of other kinds."""
    parts = range(job.n_fitted), range(job.n_fitted, job.n_windows), job.elsewhere
    seen, held_out, elsewhere = (
        reduce(add, job.workers.each(share, part.stop, part.start), nothing) for part in parts
    )
    return seen, held_out, elsewhere


def observe(w: BlockWeights, job: Job, states: Array) -> tuple[Seen, dict[int, View]]:
    """The original layer on its inputs, their statistics, and its attention on the probed windows, by their index."""
    d, probed, gqa = job.spec.dim, job.probed, job.gqa
    n, length, _ = states.shape
    queries = np.empty((n, length, gqa.n_heads, gqa.head_dim), np.float32)
    mixed = np.empty((n, length, gqa.n_heads * gqa.head_dim), np.float32)

    def share(windows: range) -> tuple[Matrix, Matrix, Matrix, Matrix, dict[int, View]]:
        covariance, attended, views = np.zeros((d, d)), np.zeros((d, d)), {}
        gram, gram_elsewhere = np.zeros((2, *(mixed.shape[-1],) * 2))
        for i in windows:
            inputs = job.inputs(w, states[i])
            queries[i], mixed[i] = gqa_mixed(inputs, w, gqa)
            if i in job.judged:
                gram += mixed[i].T @ mixed[i]
            if i in probed:
                views[i] = attention_view(inputs, w, gqa)
            if i in job.elsewhere:
                gram_elsewhere += mixed[i].T @ mixed[i]
                continue
            covariance += inputs.T @ inputs
            if i in probed:
                attended += attended_moment(inputs, views[i])
        return covariance, attended, gram, gram_elsewhere, views

    found = job.workers.each(share, n)
    covariance, attended, *grams = (
        np.asarray(sum(matrices)) for matrices in zip(*(part[:4] for part in found), strict=True)
    )
    w_o = w["attn_output.weight"]
    energy, energy_elsewhere = (
        float(np.sum((w_o @ gram.astype(np.float32)) * w_o, dtype=np.float64)) for gram in grams
    )
    scale = float(np.sqrt(energy / (len(job.judged) * length) / gqa.n_heads))
    views = {i: view for part in found for i, view in part[4].items()}
    n_probed = len(probed.difference(job.elsewhere))
    stats = LayerStats(covariance / (job.n_windows * length), attended / n_probed, scale)
    return Seen(stats, queries, mixed, energy, energy_elsewhere), views


def mix(
    w: BlockWeights, job: Job, states: Array, maps: LayerMaps, q: QueryRows, seen: Seen
) -> tuple[Array, Moments, Moments, Moments]:
    """Mixed latents (n + m, T, H * R) of the converted layer, and their moments with the original's outputs.

    The moments are of the fitted windows, of the held-out ones, and of text of other kinds.
    """
    n, length, mixed_width = seen.mixed.shape
    width = job.gqa.n_heads * job.target.kv_lora_rank
    latents = np.empty((n, length, width), np.float32)
    w_o = w["attn_output.weight"]

    def share(windows: range) -> Moments:
        gram, cross = np.zeros((width, width), np.float32), np.zeros((width, mixed_width), np.float32)
        for i in windows:
            latents[i] = mixed_latents(
                job.inputs(w, states[i]), seen.queries[i], q.query_map, maps, job.target
            )
            gram += latents[i].T @ latents[i]
            cross += latents[i].T @ seen.mixed[i]
        return Moments(gram.astype(np.float64), (cross @ w_o.T).astype(np.float64), len(windows) * length)

    nothing = Moments(np.zeros((width, width)), np.zeros((width, len(w_o))), 0)
    return latents, *_parts(job, share, nothing)


def advance(w: BlockWeights, job: Job, states: Array, mixed: Array, decode: Array) -> Array:
    """Hidden states after the layer, whose attention gives mixed (., T, F) @ decode (F, D); they overwrite `states`."""

    def share(windows: range) -> None:
        for i in windows:
            states[i] = feed_forward(states[i] + mixed[i] @ decode, w, job.spec.norm_eps)

    job.workers.each(share, len(states))
    return states
