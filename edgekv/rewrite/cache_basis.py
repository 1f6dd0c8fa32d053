"""Basis of a cached row in which block-quantized caches (q8_0 to q4_0) lose least.

A model does not depend on the basis of its latent: an invertible map of it is undone in k_b and v_b. Nor does it
on a complex factor for each pair of the rope key, undone in the queries: such factors commute with RoPE. A block
format does: it rounds 32 values by the largest of them.

Let C be the second moment of the latent z and S the sensitivity of the attention output to an error in it, so
that an error of covariance E costs tr(S E). Rounding G z leaves errors about proportional to the mean of
diag(G C G^T), the same for all channels once they are mixed, at the cost of tr(G^-T S G^-1). The product is least,
(sum of sqrt(lambda))^2 / R with lambda the eigenvalues of C S, where G diagonalises both, makes them equal and then
mixes all channels by any orthogonal map that spreads each over all: the transform of QuIP (arXiv 2307.13304) and
QuaRot (arXiv 2404.00456), for a cache all of whose readers are known.

Pairs of the rope key cannot be mixed, so their factors are found by trying: few have most of the energy, and
those set the scale of their block.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgekv.quant.formats import FORMATS
from edgekv.quant.rounding import round_blocks
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.linalg import Matrix, sqrt_and_inverse
from edgekv.rewrite.rope_pairs import Complex, to_complex, to_pairs
from edgekv.source import Array
from edgekv.spec import MLA

ATTENTION = ("q", "kv_a", "k_b", "v_b", "output")  # of a student layer; their shapes: in_cache_basis
BITS, BLOCK = 4, FORMATS["q4_0"].block  # the format whose rounding is made to cost least
FLOOR = 1e-6  # of the largest eigenvalue or size: directions that carry nothing stay invertible
SEEN = 1e-5  # of the largest eigenvalue: what the sample hardly showed is not blown up
SAMPLED_WINDOWS = 8
TRIED_TOKENS = 1024
LONGEST = 2048  # cached keys are rotated: factors are tried at positions below this
SCALE_STEPS = (1.5, 1.25, 1.1)
TURN = 0.4  # radians


def in_cache_basis(layer: Mapping[str, Array], inputs: Array, mla: MLA) -> dict[str, Array]:
    """One layer's tensors in the best basis for rounding; the function stays what it is.

    Args:
        layer: q (H*(N+P), D), kv_a (R+P, D) without norm scaling, k_b (H, R, N), v_b (H, V, R), output (D, H*V).
        inputs: (n, D) what the attention gets, normed, without first tokens: they are attention sinks, and their
            activations would outweigh all others'. n should be several times R.
    """
    h, n, p, r = mla.n_heads, mla.nope_dim, mla.rope.dim, mla.kv_lora_rank
    q, kv_a, k_b, v_b, output = (layer[name].astype(np.float64) for name in ATTENTION)
    heads = q.reshape(h, n + p, -1)
    readers = output.reshape(-1, h, mla.value_dim).swapaxes(0, 1) @ v_b  # (H, D, R)
    rows = inputs @ kv_a.T
    latent, key = rows[:, :r], np.ascontiguousarray(rows[:, r:]).view(np.complex128)
    of_latent, of_rope = _sensitivities(latent, inputs @ q.T, k_b, readers, mla)
    basis, inverse = latent_basis(latent.T @ latent / len(latent), of_latent)
    factors = rope_factors(_some_rotated(key, mla), of_rope)
    turned = to_complex(heads[:, n:]) / factors.conj()[:, None]  # q . k = Re(q conj(k))
    changed = {
        "q": np.concatenate([heads[:, :n], to_pairs(turned)], axis=1).reshape(q.shape),
        "kv_a": np.concatenate([basis @ kv_a[:r], to_pairs(to_complex(kv_a[r:]) * factors[:, None])]),
        "k_b": inverse.T @ k_b,
        "v_b": v_b @ inverse,
    }
    return {**layer, **{name: array.astype(np.float32) for name, array in changed.items()}}


def spread(n_windows: int) -> NDArray[np.int64]:
    """Which of `n_windows` windows give enough inputs to choose a basis by."""
    return np.unique(np.linspace(0, n_windows - 1, SAMPLED_WINDOWS).round().astype(np.int64))


def _sensitivities(
    latent: Matrix, queries: Matrix, k_b: Matrix, readers: Matrix, mla: MLA
) -> tuple[Matrix, Matrix]:
    """What an error costs in the latent, (R, R), and in each pair of the rope key, (P/2,).

    queries (n, H*(N+P)), readers (H, D, R) from a latent to a head's share of the output. To first order, an error e
    in a value costs |reader e|^2, and one of s in a score s^2 times the spread of what that head attends to, both
    times the squared attention. The spread is taken over all tokens and the attention as one for all: weighing each
    token by its own gained nothing.
    """
    h, n = mla.n_heads, mla.nope_dim
    spread_of_latent = np.atleast_2d(np.cov(latent, rowvar=False, bias=True))
    of_latent, of_rope = np.zeros_like(spread_of_latent), np.zeros(mla.rope.dim)
    by_head = queries.reshape(len(queries), h, -1).swapaxes(0, 1)
    for head, reader, reading in zip(by_head, readers, k_b, strict=True):
        gram = reader.T @ reader
        seen = head.T @ head / len(head) * mla.score_scale**2
        of_score = float(np.sum(gram * spread_of_latent))
        of_latent += gram + of_score * reading @ seen[:n, :n] @ reading.T
        of_rope += of_score * np.diag(seen)[n:]
    return of_latent, of_rope.reshape(-1, 2).mean(axis=1)


def latent_basis(moment: Matrix, sensitivity: Matrix) -> tuple[Matrix, Matrix]:
    """The basis G (R, R) for a latent of that second moment, of the latent's own mean size, and its inverse."""
    root, inverse_root = sqrt_and_inverse(moment, SEEN)
    strengths, vectors = np.linalg.eigh(root @ sensitivity @ root)
    sizes = np.maximum(strengths, strengths[-1] * FLOOR) ** 0.25
    mixing = np.linalg.qr(np.random.default_rng(0).standard_normal(moment.shape))[0]
    basis = mixing @ (sizes[:, None] * (vectors.T @ inverse_root))
    scale = np.sqrt(np.trace(moment) / np.sum((basis @ moment) * basis))
    return basis * scale, (root @ (vectors / sizes)) @ mixing.T / scale


def rope_factors(keys: Complex, sensitivity: Matrix) -> Complex:
    """A factor for each pair of rotated keys (n, P/2), that keeps their mean size; sensitivity (P/2,)."""
    size = np.mean(np.abs(keys) ** 2, axis=0)
    known = np.maximum(size, size.max() * FLOOR), np.maximum(sensitivity, sensitivity.max() * FLOOR)
    factors = ((known[1] / known[0]) ** 0.25).astype(np.complex128)
    for start in range(0, len(factors), BLOCK // 2):
        pairs = slice(start, start + BLOCK // 2)
        factors[pairs] = _tried(keys[:, pairs], sensitivity[pairs], factors[pairs])
    return np.asarray(factors * np.sqrt(size.sum() / np.sum(np.abs(factors) ** 2 * size)))


def _tried(keys: Complex, sensitivity: Matrix, factors: Complex) -> Complex:
    """The factors of one block's pairs, changed one by one while that makes its rounding cost less."""

    def cost(candidate: Complex) -> float:
        pairs = (keys * candidate).view(np.float64)
        codes, scales = round_blocks(pairs, BITS)
        return float(
            ((codes * scales - pairs) ** 2).mean(axis=0) @ np.repeat(sensitivity / np.abs(candidate) ** 2, 2)
        )

    best, least = factors, cost(factors)
    for step in SCALE_STEPS:
        for pair in range(len(factors)):
            for move in (step, 1 / step, np.exp(1j * TURN), np.exp(-1j * TURN)):
                candidate = best.copy()
                candidate[pair] *= move
                if (found := cost(candidate)) < least:
                    best, least = candidate, found
    return best


def _some_rotated(key: Complex, mla: MLA) -> Complex:
    """Some of the keys (n, P/2), as the cache holds them at random positions."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(key))[:TRIED_TOKENS]
    positions = rng.integers(0, LONGEST, len(chosen))
    return np.asarray(key[chosen] * np.exp(1j * positions[:, None] * inverse_frequencies(mla.rope)))
