"""One layer's maps from keys and values to a cached row and from queries and rows to outputs, before any refit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.encoded.heads import rope_at
from edgekv.convert.encoded.rope_slots import find_slots
from edgekv.convert.latent import DISTANCE, joint_latent, weighted_values
from edgekv.convert.rope_key import RopeKey
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Matrix, sqrt_and_inverse
from edgekv.rewrite.rope_pairs import Complex
from edgekv.source import Array
from edgekv.spec import GQA, MLA, Encoder, RopeSpec

# Components are chosen by what is lost of them over distances up to this one.
FAR = 256.0  # tokens
# What an error in scores costs, of the root mean square norm of a head's output: measured (docs/LOG.md).
SCORE_WEIGHT = 0.5
SPLIT_STEP = 8  # dims between the rope keys that are tried


@dataclass(frozen=True)
class Stats:
    """What calibration saw of one layer, [k; v] standing for the 2 * G * K keys and values of a token.

    queries (H, K, K): E[q q^T] of each head. keys (K/2, G, G): covariances of rotated keys on each pair, as
    edgekv.convert.encoded.rope_slots.key_covariances has them. moment, mixed_moment: E[z z^T] of z = [k; v] less
    `center`, and the same mixed by a head's attention, averaged over heads. center: the keys' means; zero for values,
    because the sink's are near zero and centring would spend rank on it. output_scale: root mean square norm of one
    head's share of the attention's output.
    """

    queries: Matrix
    keys: Complex
    moment: Matrix
    mixed_moment: Matrix
    center: Matrix
    output_scale: float


@dataclass(frozen=True)
class Maps:
    """A layer whose scores are not divided by anything yet. target: its shape.

    encoder (R + P, 2 * G * K) and offset (R + P,) write a row; query_map (H, R + P, K) maps a query to what reads rows;
    value (H, K, R) decodes a head's value.
    """

    target: MLA
    encoder: Array
    offset: Array
    query_map: Array
    value: Array
    rope_kept: float
    latent_kept: float
    latent_kept_at: dict[int, float]


class Candidates:
    """Rows of all widths for one layer: what each loses, and the maps of one.

    w_o (D, H * K). `gqa`: the attention behind biases, norms and order of dims (edgekv.convert.encoded.heads).
    """

    def __init__(self, stats: Stats, w_o: Array, gqa: GQA) -> None:
        self._stats, self._gqa = stats, gqa
        self._held, held_far = (_without_rope(gqa, distance) for distance in (DISTANCE, FAR))
        self._slots = find_slots(stats.queries, stats.keys, gqa, np.square(held_far))
        self._of_scores = SCORE_WEIGHT * stats.output_scale * gqa.score_scale
        self._readers = _roots(stats.queries, gqa)
        self._values = _weighted_values(w_o, gqa)
        share = np.trace(stats.moment) / np.trace(stats.mixed_moment)
        self._inputs = 0.5 * (stats.moment + share * stats.mixed_moment)
        self._energies: dict[int, NDArray[np.float64]] = {}

    def lost(self, width: int, rope_dim: int | None) -> float:
        """What rows of `width` values lose of the layer's output, per token, squared: a guide, not a measurement."""
        return self._lost(self._split(width, rope_dim), width)

    def maps(self, source: GQA, width: int, rope_dim: int | None) -> Maps:
        """The best maps to rows of `width` values, `rope_dim` of them rotated, or as many as lose least."""
        gqa, n = self._gqa, self._split(width, rope_dim)
        rope_key = self._slots.rope_key(n, gqa)
        keys, rows = self._latent_rows(rope_key)
        rank = width - 2 * n
        latent = joint_latent(self._values, rows, self._inputs, rank, keys)
        group = gqa.n_heads // gqa.n_kv_heads
        nope = np.repeat((keys @ latent.decoder).swapaxes(1, 2), group, axis=0)  # (H, R, K)
        value = latent.decoder[len(latent.decoder) // 2 :].reshape(gqa.n_kv_heads, gqa.head_dim, rank)
        offset = np.concatenate([-latent.encoder @ self._stats.center, np.zeros(2 * n)])
        return Maps(
            target=target_spec(source, rank, rope_at(self._slots.speeds(n, gqa)).factors),
            encoder=np.concatenate([latent.encoder, rope_key.encoder]).astype(np.float32),
            offset=offset.astype(np.float32),
            query_map=(np.concatenate([nope, rope_key.query], axis=1) * gqa.score_scale).astype(np.float32),
            value=np.repeat(value, group, axis=0).astype(np.float32),
            rope_kept=rope_key.kept,
            latent_kept=latent.kept,
            latent_kept_at=latent.kept_at,
        )

    def _split(self, width: int, rope_dim: int | None) -> int:
        """How many slots the rope key gets: one for each pair at least, where that leaves half of the row."""
        most = min(self._slots.turning, (width - 1) // 2)
        if rope_dim is not None:
            return min(rope_dim // 2, most)
        firsts = self._slots.firsts
        least = min(firsts, most) if width >= 4 * firsts else 0
        return min(range(least, most + 1, SPLIT_STEP // 2), key=lambda n: self._lost(n, width))

    def _lost(self, n: int, width: int) -> float:
        if n not in self._energies:
            _, scores = self._latent_rows(self._slots.rope_key(n, self._gqa))
            rows = np.concatenate([self._values, scores])
            self._energies[n] = np.linalg.eigvalsh(rows @ self._inputs @ rows.T)[::-1]
        beyond = np.maximum(self._energies[n][width - 2 * n :], 0.0)
        return float(beyond.sum() + 0.5 * self._of_scores**2 * self._slots.unheld(n))

    def _latent_rows(self, rope_key: RopeKey) -> tuple[Matrix, Matrix]:
        """The keys that the latent serves, and the same weighted by what an error of theirs costs."""
        keys = rope_key.leftover * np.repeat(self._held, 2)[None, :, None]
        return keys, self._of_scores * (self._readers @ keys).reshape(-1, keys.shape[-1])


def target_spec(source: GQA, rank: int, factors: tuple[float, ...]) -> MLA:
    """The latent attention that stands for `source`; `factors` are 1 / speed of each pair of the rope key."""
    return MLA(
        n_heads=source.n_heads,
        kv_lora_rank=rank,
        nope_dim=source.head_dim,
        value_dim=source.head_dim,
        rope=RopeSpec(1.0, 2 * len(factors), "interleaved", factors),
        scale=source.scale,
        encoder=Encoder(source.n_kv_heads, source.head_dim, source.bias, source.qk_norm),
        window=source.window,
        softcap=source.softcap,
    )


def _without_rope(gqa: GQA, distance: float) -> Matrix:
    """What is left of a key on each pair, (K/2,), where it stands for all angles up to that distance."""
    turn = inverse_frequencies(gqa.rope) * distance
    return np.where(turn < np.pi, np.sinc(turn / np.pi), 0.0)


def _roots(queries: Matrix, gqa: GQA) -> Matrix:
    """(G, K, K): square roots of the second moments of all queries that read a KV head."""
    g, k = gqa.n_kv_heads, gqa.head_dim
    return np.stack([sqrt_and_inverse(readers)[0] for readers in queries.reshape(g, -1, k, k).sum(axis=1)])


def _weighted_values(w_o: Array, gqa: GQA) -> Matrix:
    """Rows (G * K, 2 * G * K) of the values, weighted by the heads that read them."""
    g, k = gqa.n_kv_heads, gqa.head_dim
    by_head = w_o.reshape(len(w_o), gqa.n_heads, k).swapaxes(0, 1).astype(np.float64)
    rows = np.eye(g * k, 2 * g * k, g * k).reshape(g, k, -1)
    return weighted_values(rows, by_head)
