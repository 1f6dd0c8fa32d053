"""The picture of a comparison: what stands in it, and what must not."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from matplotlib.axes import Axes

from edgekv.cli.main import cli
from edgekv.devices.reporting.compare import load_sources
from edgekv.devices.reporting.picture import comparison_figure
from edgekv.errors import BackendError, InputError

REPORTS = Path(__file__).parents[3] / "devices/reports"
MEASURED = Path(__file__).parent / "reports/measured.json"


def panels(paths: Sequence[Path]) -> tuple[Axes, Axes]:
    """The axes of speed and of memory."""
    speed, memory = comparison_figure(load_sources(paths)).axes
    return speed, memory


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def edited(tmp_path: Path, edit: Any) -> Path:
    """The measured report after `edit`."""
    data = json.loads(MEASURED.read_text())
    edit(data)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(data))
    return path


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def test_every_machine_and_its_figures_are_drawn() -> None:
    paths = sorted(REPORTS.glob("pi-5-*.json"))
    speed, memory = panels(paths)
    for path in paths:
        (run,) = json.loads(path.read_text())["runs"]
        deepest = run["points"][-1]
        assert f"{deepest['decode_tps']['median']:.3g} at {deepest['depth']:,}" in texts(speed)
        assert f"{run['points'][0]['decode_tps']['median']:.3g}" in texts(speed)
        mib = run["memory"]["peak_rss_nbytes"] / 2**20
        assert f"{mib:,.0f}" in texts(memory)
        assert any(bar.get_width() == pytest.approx(mib) for bar in memory.patches)
    assert texts(speed).count("Raspberry Pi 5, projected") == 1


def test_an_emulators_speed_is_not_drawn() -> None:
    speed, memory = panels([REPORTS / "emulated-cortex-a53.json"])
    assert not any(len(line.get_xdata()) for line in speed.lines)
    assert len(memory.patches) == 2


def test_where_a_figure_comes_from_is_told_by_its_looks() -> None:
    names = ("x86-2-cores", "emulated-cortex-a53", "pi-5-smollm2-projected")
    looks = set()
    for name in names:
        _, memory = panels([REPORTS / f"{name}.json"])
        bar = memory.patches[0]
        looks.add((bar.get_alpha(), bar.get_hatch(), bar.get_linestyle()))
    assert len(looks) == 3
    speed, _ = panels([REPORTS / f"{name}.json" for name in reversed(names)])
    machines = [text for text in texts(speed) if text.startswith(("Linux", "emulated", "Raspberry"))]
    assert [text.split()[0] for text in machines] == ["Linux", "emulated", "Raspberry"]  # measured first


def test_speeds_stand_at_their_place_on_the_axis() -> None:
    speed, _ = panels([MEASURED])
    drawn = {float(x) for line in speed.lines for x in line.get_xdata()}
    runs = json.loads(MEASURED.read_text())["runs"]
    for run in runs:
        assert {run["points"][i]["decode_tps"]["median"] for i in (0, -1)} <= drawn
    assert speed.get_xscale() == "log"


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> $\\$"
    path = edited(tmp_path, lambda data: data["machine"].update(board=name))
    out = tmp_path / "out.svg"
    assert compare(path, "--svg", out).exit_code == 0
    assert "<script" not in out.read_text()
    assert any(name in (text or "") for text in ElementTree.parse(out).getroot().itertext())


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda data: [run.update(points=[], memory=None) for run in data["runs"]])
    out = tmp_path / "out.svg"
    result = compare(path, "--svg", out)
    assert isinstance(result.exception, InputError)
    assert "to draw" in str(result.exception)
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = compare(MEASURED, "--svg", tmp_path / "out.svg")
    assert isinstance(result.exception, BackendError)
    assert "edgekv[plot]" in str(result.exception)


def test_the_command_writes_it_and_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "boards.svg"
    assert compare(MEASURED, "--svg", out).exit_code == 0
    first = out.read_bytes()
    assert compare(MEASURED, "--svg", out).exit_code != 0
    assert compare(MEASURED, "--svg", out, "--force").exit_code == 0
    assert out.read_bytes() == first


def test_the_published_picture_shows_the_published_reports() -> None:
    root = ElementTree.parse(REPORTS.parents[1] / "docs/boards.svg").getroot()
    shown = [text for text in root.itertext() if text.strip()]
    for axes in panels(sorted(REPORTS.glob("*.json"))):
        for text in texts(axes):
            assert text in shown
