"""Passes over all calibration windows for one layer, on all cores: the original attention, then the latent's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.encoded.heads import HeadOrder, make_heads
from edgekv.convert.encoded.maps import Maps, Stats
from edgekv.convert.encoded.rope_slots import key_covariances
from edgekv.convert.one_window import PROBE_TOKENS, View
from edgekv.convert.output_fit import HELD_OUT, Moments
from edgekv.convert.query_fit import Probe, rotate_rope_part
from edgekv.convert.statistics import MAX_PROBES
from edgekv.convert.workers import Workers
from edgekv.reference.attention import attend
from edgekv.reference.model import BlockWeights, behind_attention
from edgekv.reference.ops import apply_rope, per_head, rms_norm, softcap
from edgekv.rewrite.rope_pairs import Complex
from edgekv.source import Array
from edgekv.spec import GQA, ModelSpec


@dataclass(frozen=True)
class LayerJob:
    """One layer to convert. source: its attention; gqa: the same behind biases, norms and order of dims."""

    spec: ModelSpec
    layer: int
    source: GQA
    gqa: GQA
    order: HeadOrder
    n_windows: int
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
    def probed(self) -> set[int]:
        """Windows whose attention is looked at, some of the fitted and some of the held-out ones."""
        n_held = min(round(MAX_PROBES * HELD_OUT), self.n_windows - self.n_fitted)
        n_fitted = min(MAX_PROBES - n_held, self.n_fitted)
        return {*range(n_fitted), *range(self.n_fitted, self.n_fitted + n_held)}

    def made(self, w: BlockWeights, x: Array) -> tuple[Array, Array]:
        """Queries (T, H, K) and [k; v] (T, 2 * G * K) of hidden states x (T, D)."""
        eps = self.spec.norm_eps
        return make_heads(rms_norm(x, w["attn_norm.weight"], eps), w, self.source, self.order, eps)


@dataclass(frozen=True)
class Seen:
    """The original layer on the windows.

    queries (n, T, H, K) before RoPE, made (n, T, 2 * G * K): [k; v], mixed (n, T, H * K) values without their bias,
    energy: the sum of |W_o mixed|^2 over judged tokens. views: attention on the probed windows, by their index.
    """

    stats: Stats
    queries: Array
    made: Array
    mixed: Array
    energy: float
    views: dict[int, View]


def observe(w: BlockWeights, job: LayerJob, states: Array) -> Seen:
    """Run the original attention on hidden states (n, T, D)."""
    gqa, (n, length, _) = job.gqa, states.shape
    h, k, width = gqa.n_heads, gqa.head_dim, 2 * gqa.n_kv_heads * gqa.head_dim
    queries = np.empty((n, length, h, k), np.float32)
    made = np.empty((n, length, width), np.float32)
    mixed = np.empty((n, length, h * k), np.float32)

    def share(windows: range) -> tuple[NDArray[np.float64], ...]:
        of_queries, moment, total = np.zeros((h, k, k)), np.zeros((width, width)), np.zeros(width)
        gram = np.zeros((h * k, h * k))
        for i in windows:
            queries[i], made[i] = job.made(w, states[i])
            mixed[i] = _mixed_values(queries[i], made[i], gqa)
            of_queries += queries[i].transpose(1, 2, 0) @ queries[i].swapaxes(0, 1)
            moment += made[i].T @ made[i]
            total += made[i].sum(axis=0)
            if i in job.judged:
                gram += mixed[i].T @ mixed[i]
        return of_queries, moment, total, gram

    parts = zip(*job.workers.each(share, n), strict=True)
    of_queries, moment, total, gram = (np.asarray(sum(part)) for part in parts)
    center = total / (n * length)
    center[width // 2 :] = 0.0
    views = _views(job, queries, made)
    w_o = w["attn_output.weight"].astype(np.float64)
    energy = float(np.sum((w_o @ gram) * w_o))
    stats = Stats(
        queries=of_queries / (n * length),
        keys=_key_covariances(views, made, gqa),
        moment=_centered(moment / (n * length), total / (n * length), center),
        mixed_moment=_mixed_moment(views, made - center.astype(np.float32)),
        center=center,
        output_scale=float(np.sqrt(energy / (len(job.judged) * length) / h)),
    )
    return Seen(stats, queries, made, mixed, energy, views)


def _centered(
    moment: NDArray[np.float64], mean: NDArray[np.float64], center: NDArray[np.float64]
) -> NDArray[np.float64]:
    """E[(z - c)(z - c)^T] of E[z z^T] and E[z]."""
    cross = np.outer(mean, center)
    return np.asarray(moment - cross - cross.T + np.outer(center, center))


def _split_rows(made: Array, gqa: GQA) -> tuple[Array, Array]:
    """Rotated keys and values, each (G, T, K), of [k; v] (T, 2 * G * K)."""
    keys, values = made.reshape(len(made), 2, gqa.n_kv_heads, gqa.head_dim).swapaxes(0, 1)
    return apply_rope(keys, np.arange(len(made)), gqa.rope).swapaxes(0, 1), values.swapaxes(0, 1)


def _mixed_values(queries: Array, made: Array, gqa: GQA) -> Array:
    keys, values = _split_rows(made, gqa)
    rotated = apply_rope(queries, np.arange(len(made)), gqa.rope)
    mixed = attend(rotated, keys, values, gqa.score_scale, gqa.window, gqa.softcap)
    return mixed.reshape(len(made), -1)


def _views(job: LayerJob, queries: Array, made: Array) -> dict[int, View]:
    def share(windows: range) -> dict[int, View]:
        chosen = [sorted(job.probed)[i] for i in windows]
        return {i: _view(queries[i, :PROBE_TOKENS], made[i, :PROBE_TOKENS], job.gqa) for i in chosen}

    return {i: view for part in job.workers.each(share, len(job.probed)) for i, view in part.items()}


def _view(queries: Array, made: Array, gqa: GQA) -> View:
    """The original's scores before any cap, and its attention."""
    t = len(made)
    rotated = apply_rope(queries, np.arange(t), gqa.rope).swapaxes(0, 1) * np.float32(gqa.score_scale)
    keys = np.repeat(_split_rows(made, gqa)[0], gqa.n_heads // gqa.n_kv_heads, axis=0)  # (H, T, K)
    scores = np.asarray(rotated @ keys.swapaxes(1, 2), dtype=np.float32)
    age = np.arange(t)[:, None] - np.arange(t)
    visible = (age >= 0) & (age < (gqa.window or t))
    attention = np.where(visible, softcap(scores, gqa.softcap), np.float32(-np.inf))
    attention -= attention.max(axis=-1, keepdims=True)
    np.exp(attention, out=attention)
    attention /= attention.sum(axis=-1, keepdims=True)
    return View(scores, attention)


def _mixed_moment(views: dict[int, View], made: Array) -> NDArray[np.float64]:
    """E[z z^T] of what heads make of centered rows (n, T, W) by their attention, averaged over heads."""
    total = np.zeros((made.shape[-1],) * 2)
    for i, view in views.items():
        seen = view.attention.shape[-1]
        pairs = (view.attention.swapaxes(1, 2) @ view.attention).mean(axis=0)  # E_h[p_h^T p_h], (S, S)
        total += made[i, :seen].T @ pairs @ made[i, :seen] / np.float32(seen)
    return total / len(views)


def _key_covariances(views: dict[int, View], made: Array, gqa: GQA) -> Complex:
    found = []
    for i, view in views.items():
        keys, _ = _split_rows(made[i, : view.attention.shape[-1]], gqa)
        pairs = np.asarray(
            np.ascontiguousarray(keys.swapaxes(0, 1)).view(np.complex64), np.complex128
        )  # (S, G, K/2)
        found.append(key_covariances(pairs, view.attention))
    return np.asarray(sum(found) / len(found))


def cached_rows(made: Array, maps: Maps) -> Array:
    """What is cached of [k; v] (T, 2 * G * K): (T, R + P), the rope key rotated."""
    return rotate_rope_part((made @ maps.encoder.T + maps.offset)[:, None], maps.target, +1)[:, 0]


def probes(seen: Seen, maps: Maps, indices: list[int]) -> list[Probe]:
    """What the query fit needs of probed windows."""
    found = []
    for i in indices:
        view = seen.views[i]
        n = view.scores.shape[-1]
        found.append(
            Probe(seen.queries[i, :n], cached_rows(seen.made[i, :n], maps), view.scores, view.attention)
        )
    return found


def mix(w: BlockWeights, job: LayerJob, maps: Maps, seen: Seen) -> tuple[Array, Moments, Moments]:
    """Mixed latents (n, T, H * R), and their moments with the original's outputs.

    The moments are of the fitted windows and of the held-out ones.
    """
    n, length, mixed_width = seen.mixed.shape
    target = maps.target
    width = target.n_heads * target.kv_lora_rank
    latents = np.empty((n, length, width), np.float32)
    w_o = w["attn_output.weight"]

    def share(windows: range) -> Moments:
        gram, cross = np.zeros((width, width), np.float32), np.zeros((width, mixed_width), np.float32)
        for i in windows:
            latents[i] = _mixed_latents(seen.queries[i], seen.made[i], maps)
            gram += latents[i].T @ latents[i]
            cross += latents[i].T @ seen.mixed[i]
        return Moments(gram.astype(np.float64), (cross @ w_o.T).astype(np.float64), len(windows) * length)

    def both(start: int, stop: int) -> Moments:
        nothing = Moments(np.zeros((width, width)), np.zeros((width, len(w_o))), 0)
        return reduce(add, job.workers.each(share, stop, start), nothing)

    return latents, both(0, job.n_fitted), both(job.n_fitted, n)


def _mixed_latents(queries: Array, made: Array, maps: Maps) -> Array:
    target = maps.target
    rows = cached_rows(made, maps)[None]
    reading = rotate_rope_part(per_head(queries, maps.query_map), target, +1)
    latents = rows[..., : target.kv_lora_rank]
    return attend(reading, rows, latents, 1.0, target.window, target.softcap).reshape(len(made), -1)


def advance(
    w: BlockWeights, job: LayerJob, states: Array, mixed: Array, finish: Callable[[Array], Array]
) -> Array:
    """Hidden states behind the layer, whose attention gives finish(mixed[i]); they overwrite `states`."""

    def share(windows: range) -> None:
        for i in windows:
            states[i] = behind_attention(states[i], finish(mixed[i]), w, job.spec, job.layer)

    job.workers.each(share, job.n_windows)
    return states
