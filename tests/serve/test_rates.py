"""What an engine's speeds are taken to be from what its batches took."""

from __future__ import annotations

import pytest

from edgekv.backends.sequences import Piece
from edgekv.route.cost import Prefill
from edgekv.serve.engine.rates import Rates


def test_slices_of_equal_time_still_tell_tokens_from_depth() -> None:
    truth, rates, depth = Prefill(0.0, 0.005, 1.5e-6), Rates(), 0
    while depth < 4000:
        count = 100
        while truth.seconds(count, depth) < 1.0:
            count += 1
        rates.ran([Piece(0, depth, [1] * count, logits=False)], truth.seconds(count, depth))
        depth += count
    assert rates.prefill.seconds(4000, 0) == pytest.approx(truth.seconds(4000, 0), rel=0.01)
    assert rates.prefill.seconds(500, 3000) == pytest.approx(truth.seconds(500, 3000), rel=0.01)


def test_each_kind_of_batch_tells_of_its_own() -> None:
    rates = Rates()
    before = rates.now()
    rates.ran(
        [Piece(0, 9, [1], logits=True), Piece(1, 5, [1, 2, 3], logits=False)], 1.0
    )  # a mixed batch tells nothing
    assert rates.now() == before
    rates.ran([Piece(0, 9, [1], logits=True)], 0.02)
    rates.ran([Piece(0, 9, [1] * 32, logits=True)], 0.2)
    rates.saved(10**6, 0.1)
    now = rates.now()
    assert (now.decode_s, now.save_s) == (pytest.approx(0.02), pytest.approx(1e-7))
    assert now.prefill == before.prefill
    assert now.short != before.short
