"""Components of a rope key: what all of them hold, which come first, what softmax does not see."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.convert.encoded.heads import rope_at
from edgekv.convert.encoded.rope_slots import RopeSlots, find_slots, key_covariances
from edgekv.reference.ops import apply_rope
from edgekv.spec import GQA

RNG = np.random.default_rng(0)
H, G, K = 4, 2, 8
SPEEDS = np.array([1.0, 0.3, 0.01, 0.0])
HELD = np.array([0.0, 0.2, 0.999, 1.0])
GQA_ = GQA(H, G, K, rope_at(SPEEDS))
QUERIES = RNG.standard_normal((300, H, K))
MADE = RNG.standard_normal((300, 2 * G * K)) @ RNG.standard_normal((2 * G * K,) * 2)
MOMENTS = np.einsum("thk,thl->hkl", QUERIES, QUERIES) / 300


EVENLY = np.tri(300) / np.arange(1, 301)[:, None]


def covariances(made: np.ndarray, attention: np.ndarray = EVENLY) -> np.ndarray:
    keys = apply_rope(made[:, : G * K].reshape(-1, G, K).astype(np.float32), np.arange(len(made)), GQA_.rope)
    pairs = keys[..., 0::2] + 1j * keys[..., 1::2]
    return key_covariances(pairs, np.broadcast_to(attention, (H, *attention.shape)).astype(np.float32))


def slots(made: np.ndarray = MADE) -> RopeSlots:
    return find_slots(MOMENTS, covariances(made), GQA_, HELD)


@pytest.mark.parametrize("n", [0, 3, 8])
def test_rope_key_and_leftover_are_the_key(n: int) -> None:
    """At any two positions: what the shared key scores, and what the leftover would with RoPE, is the whole."""
    key = slots().rope_key(n, GQA_)
    rope = rope_at(slots().speeds(n, GQA_))
    query, made, at = QUERIES[:1].astype(np.float32), MADE[0], np.array([5])
    keys = made[: G * K].reshape(1, G, K).astype(np.float32)
    rotated_query = apply_rope(query, np.array([30]), GQA_.rope)[0]

    def score(keys: np.ndarray) -> np.ndarray:
        rotated = apply_rope(keys.astype(np.float32), at, GQA_.rope)[0]
        return np.einsum("hk,hk->h", rotated_query, np.repeat(rotated, H // G, axis=0))

    reading = apply_rope(
        np.einsum("hpk,hk->hp", key.query, query[0])[None].astype(np.float32), np.array([30]), rope
    )[0]
    row = apply_rope((key.encoder @ made)[None, None].astype(np.float32), at, rope)[0, 0]
    np.testing.assert_allclose(
        reading @ row + score((key.leftover @ made)[None]), score(keys), rtol=1e-3, atol=1e-2
    )
    if n == 8:
        np.testing.assert_allclose(key.leftover, 0, atol=1e-9)
        assert key.kept == pytest.approx(1)


def test_every_pair_that_turns_then_what_no_latent_holds() -> None:
    found = slots()
    assert found.firsts == 3
    assert sorted(found.pair[:3]) == [0, 1, 2], "one of each pair that turns comes first"
    for part in (found.need[:3], found.need[3:]):
        assert (np.diff(part) <= 0).all()
    assert found.turning == 6, "what does not turn needs no rope key"
    assert set(found.pair[-2:]) == {3}
    assert found.unheld(0) == pytest.approx(found.need.sum())
    assert found.unheld(8) == 0
    assert (np.diff(found.speeds(6, GQA_)) <= 0).all()


def test_what_tokens_share_counts_where_it_turns() -> None:
    shared = np.zeros(2 * G * K)
    shared[[0, 6]] = 1000.0  # on the fastest pair, and on the one that stands still
    with_shared, without = covariances(MADE + shared), covariances(MADE)
    assert with_shared[0, 0, 0].real > 1000 * without[0, 0, 0].real
    np.testing.assert_allclose(with_shared[3], without[3], rtol=1e-2, atol=0.1)


def test_a_token_that_takes_the_attention_counts() -> None:
    """The variance within each query, written out; a sink of which there is one in 300 shows in it."""
    made = MADE.copy()
    made[0] *= 30
    attention = np.full((300, 300), 0.3 / 300)
    attention[:, 0] += 0.7
    keys = apply_rope(made[:, : G * K].reshape(-1, G, K).astype(np.float32), np.arange(300), GQA_.rope)
    pair = keys[..., 2] + 1j * keys[..., 3]  # (S, G)
    off = pair - attention[0] @ pair
    attended = np.einsum("s,sg,sf->gf", attention[0], off, off.conj())
    evenly = np.einsum("sg,sf->gf", pair - pair.mean(0), (pair - pair.mean(0)).conj()) / 300
    found = covariances(made, attention)
    np.testing.assert_allclose(found[1], 0.5 * (attended + evenly), rtol=1e-2)
    assert np.trace(attended).real > 10 * np.trace(evenly).real
