"""The shared rope key against brute force over complex directions, and against RoPE itself."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.convert.rope_key import frequency_slots, shared_rope_key
from edgekv.reference.ops import apply_rope
from edgekv.rewrite.rope_pairs import to_complex, to_pairs
from edgekv.spec import GQA, RopeSpec

H, G, K, D = 4, 2, 8, 24
GQA_SPEC = GQA(H, G, K, RopeSpec(10000.0, K))


@pytest.fixture
def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """w_q (H, K, D), w_k (G, K, D), inputs (T, D) and their covariance."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, D)) @ rng.standard_normal((D, D)) / 5
    return rng.standard_normal((H, K, D)), rng.standard_normal((G, K, D)), x, x.T @ x / len(x)


def narrowed(rope_dim: int) -> RopeSpec:
    return RopeSpec(10000.0 ** (rope_dim / K), rope_dim)


def test_complex_and_back() -> None:
    rows = np.random.default_rng(0).standard_normal((3, K, D))
    np.testing.assert_array_equal(to_pairs(to_complex(rows)), rows)


def test_slots_keep_the_fastest_frequencies() -> None:
    assert frequency_slots(GQA_SPEC.rope, narrowed(8)).tolist() == [0, 1, 2, 3]
    assert frequency_slots(GQA_SPEC.rope, narrowed(4)).tolist() == [0, 1, -1, -1]
    assert frequency_slots(GQA_SPEC.rope, RopeSpec(10000.0, 4)).tolist() == [0, -1, 1, -1]


def test_no_complex_direction_keeps_more(layer: tuple[np.ndarray, ...]) -> None:
    """Brute force: at each frequency, 5000 random directions over the two KV heads, by energy of real samples."""
    w_q, w_k, x, c = layer
    found = shared_rope_key(w_q, w_k, c, GQA_SPEC, GQA_SPEC.rope)
    keys = np.einsum("gjd,td->gjt", to_complex(w_k), x)  # as the calibration text has them
    queries = np.einsum("hjd,td->hjt", to_complex(w_q), x)
    weight = np.sqrt((np.abs(queries) ** 2).mean(-1).reshape(G, H // G, -1).sum(1))
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((5000, G)) + 1j * rng.standard_normal((5000, G))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    best = total = 0.0
    for j in range(K // 2):
        samples = keys[:, j] * weight[:, j, None]  # (G, T)
        kept = (np.abs(directions.conj() @ samples) ** 2).mean(-1)
        best += kept.max()
        total += (np.abs(samples) ** 2).mean(-1).sum()
    assert best / total <= found.kept + 1e-9
    assert found.kept == pytest.approx(best / total, abs=2e-3)
    rest = np.einsum("gjd,td->gjt", to_complex(found.leftover), x) * weight[..., None]
    assert (np.abs(rest) ** 2).mean(-1).sum() / total == pytest.approx(1 - found.kept, abs=1e-6)


@pytest.mark.parametrize("rope_dim", [K, 4, 2])
def test_scores_split_into_shared_key_and_leftover(layer: tuple[np.ndarray, ...], rope_dim: int) -> None:
    """q^T R(m - n) k of every head is the shared key's score plus the leftover's, at any two positions."""
    w_q, w_k, x, c = layer
    rope = narrowed(rope_dim)
    found = shared_rope_key(w_q, w_k, c, GQA_SPEC, rope)
    positions = np.array([3, 40])

    def turned(vectors: np.ndarray, spec: RopeSpec, at: int) -> np.ndarray:
        return apply_rope(vectors[None, None].astype(np.float32), positions[at : at + 1], spec)[0, 0]

    for head in range(H):
        g = head // (H // G)
        query, key_input = w_q[head] @ x[0], x[1]
        full = turned(query, GQA_SPEC.rope, 1) @ turned(w_k[g] @ key_input, GQA_SPEC.rope, 0)
        shared = turned(found.query[head] @ query, rope, 1) @ turned(found.encoder @ key_input, rope, 0)
        rest = turned(query, GQA_SPEC.rope, 1) @ turned(found.leftover[g] @ key_input, GQA_SPEC.rope, 0)
        assert full == pytest.approx(shared + rest, rel=1e-3, abs=1e-2)


def test_one_kv_head_keeps_everything(layer: tuple[np.ndarray, ...]) -> None:
    w_q, w_k, _, c = layer
    mqa = GQA(H, 1, K, GQA_SPEC.rope)
    found = shared_rope_key(w_q, w_k[:1], c, mqa, mqa.rope)
    assert found.kept == pytest.approx(1)
    np.testing.assert_allclose(found.leftover, 0, atol=1e-10)
