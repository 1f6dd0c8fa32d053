"""The picture of a comparison: what stands in it, and what must not."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.devices.reporting.compare import load_sources
from edgekv.devices.reporting.picture import picture
from edgekv.errors import InputError

REPORTS = Path(__file__).parents[3] / "devices/reports"
MEASURED = Path(__file__).parent / "reports/measured.json"


def texts(svg: str) -> list[str]:
    return [
        element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    ]


def test_every_machine_and_its_figures_are_drawn() -> None:
    names = sorted(REPORTS.glob("pi-5-*.json"))
    found = texts(picture(load_sources(names)))
    for path in names:
        (run,) = json.loads(path.read_text())["runs"]
        deepest = run["points"][-1]
        assert f"{deepest['decode_tps']['median']:.3g} at {deepest['depth']:,}" in found
        assert f"{run['points'][0]['decode_tps']['median']:.3g}" in found
        assert f"{run['memory']['peak_rss_nbytes'] / 2**20:,.0f}" in found
    assert found.count("Raspberry Pi 5, projected") == 1


def test_an_emulators_speed_is_not_drawn() -> None:
    svg = picture(load_sources([REPORTS / "emulated-cortex-a53.json"]))
    assert "<circle" not in svg
    assert any(re.fullmatch(r"\d{3}", text) for text in texts(svg))  # memory is


def test_faster_is_further_right(tmp_path: Path) -> None:
    data = json.loads(MEASURED.read_text())
    for point in data["runs"][0]["points"]:
        for key in ("median", "low", "high"):
            point["decode_tps"][key] *= 50
    fast = tmp_path / "fast.json"
    fast.write_text(json.dumps(data))
    svg = picture(load_sources([MEASURED, fast]))
    filled = [float(x) for x in re.findall(r'fill:currentColor" cx="([\d.]+)"', svg)]
    n_runs = len(data["runs"])
    assert filled[n_runs] > filled[0] + 20


def test_names_are_escaped(tmp_path: Path) -> None:
    data = json.loads(MEASURED.read_text())
    data["machine"]["board"] = "<script>alert(1)</script>"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    svg = picture(load_sources([path]))
    assert "<script" not in svg
    assert any("<script>" in text for text in texts(svg))


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    data = json.loads(MEASURED.read_text())
    for run in data["runs"]:
        run |= {"points": [], "memory": None}
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="to draw"):
        picture(load_sources([path]))


def test_the_command_writes_it_and_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "boards.svg"
    arguments = ["compare", str(MEASURED), "--svg", str(out)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    first = out.read_text()
    assert CliRunner().invoke(cli, arguments).exit_code != 0
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0
    assert out.read_text() == first
