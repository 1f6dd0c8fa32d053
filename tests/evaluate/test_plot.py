"""The picture of scores against bytes per context."""

from pathlib import Path

import numpy as np

from edgekv.evaluate.plot import ContextPoint, contexts_figure, plot_contexts

POINTS = [
    ContextPoint("original", "f16", None, 94e6, 0.8, 0.02),
    ContextPoint("original", "f16", "keydiff", 23e6, 0.5, 0.04),
    ContextPoint("original", "f16", "keydiff", 47e6, 0.7, 0.03),
    ContextPoint("small", "q4_0", None, 17e6, 0.75, 0.02),
    ContextPoint("small", "q4_0", "knorm", 8e6, 0.3, 0.05),
]


def test_lines_lead_from_all_rows_to_the_fewest() -> None:
    (axes,) = contexts_figure(POINTS, "title").axes
    drawn = [np.asarray(bars.lines[0].get_xydata()) for bars in axes.containers]
    np.testing.assert_allclose(drawn[0], [(94, 80), (47, 70), (23, 50)])
    np.testing.assert_allclose(drawn[1], [(17, 75), (8, 30)])
    legend = axes.get_legend()
    assert legend is not None
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {"keydiff", "knorm", "original, f16", "small, q4_0"}


def test_the_same_points_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        plot_contexts(POINTS, "title", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 5000
