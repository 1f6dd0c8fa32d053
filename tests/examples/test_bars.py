"""The demos' picture: a PNG, and the same figures as text."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


bars = load("bars")
CHARTS = [
    bars.Chart("cache, MB", {"original": 189.4, "converted": 35.4}),
    bars.Chart("first token, s", {"original": 21.0, "converted": 20.0, "from a pack": 0.21}),
]


def test_text_bars_are_as_long_as_their_values() -> None:
    lines = bars.as_text(CHARTS).splitlines()
    assert [line.count("█") for line in lines] == [0, 40, 7, 0, 40, 38, 0]
    assert lines[1].endswith(" 189")
    assert lines[-1] == f"  {'from a pack'}   0.21"


def test_a_png_with_a_panel_per_chart(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert bars.draw(CHARTS, "both", path)
    with pillow.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height


@pytest.mark.parametrize(
    ("value", "words"),
    [(1189.4, "1,189"), (10.0, "10"), (9.96, "10.0"), (0.214, "0.21"), (0.0028, "0.003"), (0.0, "0.000")],
)
def test_about_two_significant_figures(value: float, words: str) -> None:
    assert bars.short(value) == words
