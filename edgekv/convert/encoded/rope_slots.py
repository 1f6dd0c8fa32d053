"""Rope key of several components per frequency, and the split of a cached row between it and the latent.

At each frequency the keys of all KV heads are a complex vector, and its principal components, weighted by the energy
of the queries that read them, are what a rope key can hold of it (edgekv.convert.rope_key has one for each).
Components are taken by the energy that the scores would lose without them, and the split is where rope key and latent
together lose least. In theory a component that turns slowly can as well live in the latent, which knows no RoPE.
Measured it cannot: 128+64 values of SmolLM2-135M lost KL 0.91 by that order, and 0.37 with one component of each
frequency first, which is therefore the rule.

Scores that are off by the same for all tokens cost nothing, and those of tokens that nobody attends to cost little.
So energy is the variance of rotated keys as attention weighs them, within each query: the first token, which takes
most of the attention, counts as much as it should, and what all tokens share of a key only as far as it turns
(Qwen2.5's key biases are tens of times what varies). Half of it is the variance over all tokens alike, for text that
attends otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.rope_key import RopeKey, query_map
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Matrix
from edgekv.rewrite.rope_pairs import Complex, to_complex, to_pairs
from edgekv.source import Array
from edgekv.spec import GQA


@dataclass(frozen=True)
class RopeSlots:
    """All G * K/2 components: the first of each pair that turns, by how much a rope key needs them, then the others.

    firsts: how many are the first of their pair. pair (n,): the frequency's index. need (n,): weighted energy that no
    latent can hold. energy (n,): all of it. encoder (n, 2 * G * K) and mixing (n, G): key g ~ mixing * (encoder @
    [k; v]).
    """

    firsts: int
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


def find_slots(queries: Matrix, covariances: Complex, gqa: GQA, held: NDArray[np.float64]) -> RopeSlots:
    """The components of one layer.

    queries (H, K, K): second moments of each head's query. covariances (K/2, G, G): of the keys on each pair.
    held (K/2,): the share of a key's energy on each pair that a latent without RoPE can hold.
    """
    g, pairs = gqa.n_kv_heads, gqa.head_dim // 2
    energy = np.einsum("hkk->hk", queries).reshape(gqa.n_heads, pairs, 2).sum(axis=-1)
    weight = np.sqrt(energy.reshape(g, -1, pairs).sum(axis=1) + 1e-12)  # (G, K/2)
    keys = to_complex(key_rows(gqa))
    found = []
    for j in range(pairs):
        values, vectors = np.linalg.eigh(covariances[j] * np.outer(weight[:, j], weight[:, j]))
        for order, (value, vector) in enumerate(
            zip(np.maximum(values, 0.0)[::-1], vectors.T[::-1], strict=True)
        ):
            encoder = vector.conj() @ (keys[:, j] * weight[:, j, None])
            further = order > 0 or held[j] == 1
            found.append((further, j, value * (1 - held[j]), value, encoder, vector / weight[:, j]))
    found.sort(key=lambda slot: (slot[0], -slot[2]))
    further, pair, need, energy, encoders, mixing = (np.array(column) for column in zip(*found, strict=True))
    return RopeSlots(int((~further).sum()), pair, need, energy, encoders, mixing)


def key_covariances(keys: Complex, attention: Array) -> Complex:
    """(K/2, G, G): covariances of rotated keys (S, G, K/2), half as attention (H, T, S) weighs them, half evenly.

    As attention weighs them: within each query, averaged over queries and heads.
    """
    n_heads, n_queries, n_keys = attention.shape
    by_pair = keys.transpose(2, 1, 0)  # (K/2, G, S)
    received = attention.mean(axis=(0, 1))  # (S,)
    mixed = attention.reshape(-1, n_keys) @ keys.reshape(n_keys, -1)  # (H * T, G * K/2)
    mixed = mixed.reshape(n_heads * n_queries, *keys.shape[1:]).transpose(2, 1, 0)
    attended = (by_pair * received) @ _adjoint(by_pair) - mixed @ _adjoint(mixed) / mixed.shape[-1]
    centered = by_pair - by_pair.mean(axis=-1, keepdims=True)
    return np.asarray(0.5 * (attended + centered @ _adjoint(centered) / n_keys), np.complex128)


def _adjoint(matrices: Complex) -> Complex:
    return np.asarray(matrices.conj().swapaxes(-2, -1))
