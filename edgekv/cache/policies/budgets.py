"""How many rows each layer keeps, where layers may differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekv.source import Array

STEEPNESS = 20  # the last layer's share of an even one is 1 in so many


def pyramid(n_kept: int, n_rows: int, n_layers: int) -> list[int]:
    """More rows in the first layers than in the last, in even steps, `n_kept` on average (arXiv 2406.02069)."""
    least = n_kept / STEEPNESS
    most = min(2 * n_kept - least, n_rows)
    return _whole(np.linspace(most, 2 * n_kept - most, n_layers), n_kept, n_rows)


def by_entropy(n_kept: int, n_rows: int, attention: Sequence[Array]) -> list[int]:
    """Rows in proportion to how widely a layer's attention (G, S) is spread, `n_kept` on average."""
    spread = []
    for layer in attention:
        shares = layer / np.maximum(layer.sum(axis=-1, keepdims=True), 1e-12)
        spread.append(float(-(shares * np.log(shares + 1e-12)).sum(axis=-1).mean()))
    shares = np.maximum(spread, 1e-3)
    return _whole(shares / shares.mean() * n_kept, n_kept, n_rows)


def _whole(wanted: NDArray[np.floating], n_kept: int, n_rows: int) -> list[int]:
    """Whole numbers of at most `n_rows` near those wanted, `n_kept` on average; what is cut off goes to the others."""
    rows = np.clip(np.round(wanted), 1, n_rows).astype(int)
    while (missing := n_kept * len(rows) - int(rows.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = np.flatnonzero((rows < n_rows) if step > 0 else (rows > 1))
        rows[free[: abs(missing)]] += step
    return [int(count) for count in rows]
