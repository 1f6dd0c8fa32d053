"""Budgets over layers: what they promise, and PyramidKV's own steps."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.cache.policies.budgets import by_entropy, pyramid


@pytest.mark.parametrize(
    ("n_kept", "n_rows", "n_layers"), [(100, 1000, 7), (600, 1000, 12), (64, 65, 3), (40, 500, 1)]
)
def test_a_pyramid_has_even_steps_and_the_wanted_mean(n_kept: int, n_rows: int, n_layers: int) -> None:
    rows = pyramid(n_kept, n_rows, n_layers)
    assert sum(rows) == n_kept * n_layers
    assert 1 <= min(rows) <= max(rows) <= n_rows
    steps = np.diff(rows)
    assert (steps <= 1).all()
    assert np.ptp(steps) <= 2 if len(steps) else True


def test_steps_as_kvpress_has_them() -> None:
    """PyramidKVPress.get_layer_budget for 1,000 tokens, half of them removed, in 5 layers: 975 down to 25."""
    assert pyramid(500, 1000, 5) == [975, 738, 500, 262, 25]


def test_widely_spread_attention_gets_more_rows() -> None:
    narrow, wide = np.full((2, 200), 1e-6, np.float32), np.full((2, 200), 1 / 200, np.float32)
    narrow[:, :3] = 0.3
    few, many, same = by_entropy(50, 200, [narrow, wide, wide])
    assert few < many
    assert abs(many - same) <= 1
    assert few + many + same == 150
