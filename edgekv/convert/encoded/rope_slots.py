"""Rope key of several components per frequency, and the split of a cached row between it and the latent.

At each frequency the keys of all KV heads are a complex vector, and its principal components, weighted by the energy
of the queries that read them, are what a rope key can hold of it (edgekv.convert.rope_key has one for each). A
component that turns slowly can as well live in the latent, which knows no RoPE; one that turns fast cannot. So
components are taken by the energy that the scores would lose without them, and the split is where rope key and latent
together lose least.

What all tokens share of a key adds the same to all scores of a query as long as the pair hardly turns, and softmax
does not see it: it counts only as far as it turns (Qwen2.5's key biases are tens of times what varies).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.rope_key import RopeKey, query_map
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Matrix
from edgekv.rewrite.rope_pairs import Complex, to_complex, to_pairs
from edgekv.spec import GQA

STEADY = 256.0  # tokens over which what keys share has to stand still to go unseen


@dataclass(frozen=True)
class RopeSlots:
    """All G * K/2 components, those that a rope key needs most first.

    pair (n,): the frequency's index. need (n,): weighted energy that no latent can hold. energy (n,): all of it.
    encoder (n, 2 * G * K) and mixing (n, G): key g ~ mixing * (encoder @ [k; v]).
    """

    pair: NDArray[np.int64]
    need: NDArray[np.float64]
    energy: NDArray[np.float64]
    encoder: Complex
    mixing: Complex

    @property
    def turning(self) -> int:
        """Components that a rope key can do anything for."""
        return int((self.need > 0).sum())

    def unheld(self, n: int) -> float:
        """The energy that neither the first `n` slots nor any latent holds."""
        return float(self.need[n:].sum())

    def rope_key(self, n: int, gqa: GQA) -> RopeKey:
        """The rope key of the first `n` slots, in order of their frequencies."""
        chosen = np.argsort(self.pair[:n], kind="stable")
        g, pairs = gqa.n_kv_heads, gqa.head_dim // 2
        encoder, pair = self.encoder[chosen], self.pair[chosen]
        mixing = np.zeros((g, pairs, n), np.complex128)
        mixing[:, pair, np.arange(n)] = self.mixing[chosen].T
        leftover = to_complex(key_rows(gqa)) - np.einsum("gjm,md->gjd", mixing, encoder)
        kept = float(self.energy[:n].sum() / self.energy.sum())
        return RopeKey(to_pairs(encoder), query_map(mixing, gqa.n_heads), to_pairs(leftover), kept)

    def speeds(self, n: int, gqa: GQA) -> NDArray[np.float64]:
        """How fast the first `n` slots turn, in the order of `rope_key`."""
        return np.asarray(inverse_frequencies(gqa.rope)[np.sort(self.pair[:n])])


def key_rows(gqa: GQA) -> Matrix:
    """Each head's keys as a map (G, K, 2 * G * K) of [k; v]."""
    width = gqa.n_kv_heads * gqa.head_dim
    return np.eye(width, 2 * width).reshape(gqa.n_kv_heads, gqa.head_dim, -1)


def find_slots(
    queries: Matrix, moment: Matrix, mean: Matrix, gqa: GQA, held: NDArray[np.float64]
) -> RopeSlots:
    """The components of one layer.

    queries (H, K, K): second moments of each head's query. moment (2 * G * K,) * 2 and mean (2 * G * K,): of [k; v].
    held (K/2,): the share of a key's energy on each pair that a latent without RoPE can hold.
    """
    g, pairs = gqa.n_kv_heads, gqa.head_dim // 2
    energy = np.einsum("hkk->hk", queries).reshape(gqa.n_heads, pairs, 2).sum(axis=-1)
    weight = np.sqrt(energy.reshape(g, -1, pairs).sum(axis=1) + 1e-12)  # (G, K/2)
    keys = to_complex(key_rows(gqa))
    seen = to_complex(key_rows(gqa) @ moment)
    shared = keys @ mean  # (G, K/2)
    unseen = np.square(np.sinc(inverse_frequencies(gqa.rope) * STEADY / (2 * np.pi)))
    found = []
    for j in range(pairs):
        covariance = seen[:, j] @ keys[:, j].conj().T - unseen[j] * np.outer(
            shared[:, j], shared[:, j].conj()
        )
        values, vectors = np.linalg.eigh(covariance * np.outer(weight[:, j], weight[:, j]))
        for value, vector in zip(np.maximum(values, 0.0), vectors.T, strict=True):
            encoder = vector.conj() @ (keys[:, j] * weight[:, j, None])
            found.append((j, value * (1 - held[j]), value, encoder, vector / weight[:, j]))
    found.sort(key=lambda slot: -slot[1])
    pair, need, energy, encoders, mixing = (np.array(column) for column in zip(*found, strict=True))
    return RopeSlots(pair, need, energy, encoders, mixing)
