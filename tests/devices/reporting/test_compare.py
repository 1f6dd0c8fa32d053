"""Reports side by side: tables, llama-bench files, JSON, bad input."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgekv.cli.main import cli
from edgekv.devices.reporting.compare import load_sources
from edgekv.devices.reporting.svg import ticks
from edgekv.devices.reporting.tables import entries, speed_table, warnings
from edgekv.devices.reporting.text_table import Table, as_text
from edgekv.errors import InputError

REPORTS = Path(__file__).parent / "reports"
MEASURED = REPORTS / "measured.json"
LLAMA_BENCH = REPORTS / "llama-bench.json"


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def variant(tmp_path: Path, name: str, **changes: Any) -> Path:
    """The measured report with other top-level values."""
    data = json.loads(MEASURED.read_text())
    path = tmp_path / name
    path.write_text(json.dumps(data | changes))
    return path


def test_speeds_are_the_reports_own() -> None:
    sources = load_sources([MEASURED])
    table = speed_table(entries(sources))
    for row, point in zip(table.rows[::2], sources[0].report.runs[0].points, strict=True):
        assert point.decode_tps is not None
        assert row[table.head.index("decode t/s")] == f"{point.decode_tps.median:.1f}"
        assert row[table.head.index("depth")] == f"{point.depth:,}"
    assert "J/token" not in table.head  # nothing measured it


def test_llama_bench_is_read_as_a_report() -> None:
    (source,) = load_sources([LLAMA_BENCH])
    (run,) = source.report.runs
    (point,) = run.points
    assert point.decode_tps is not None
    assert point.prefill_tps is not None
    assert point.decode_tps.samples == (9.8356, 9.8346)
    assert point.prefill_tps.median == pytest.approx(27.46855)
    assert run.model.weights_nbytes == 422782464
    assert (run.model.arch, run.model.quantization) == ("qwen2", "Q4_0")
    assert source.report.settings.threads == 4
    assert any("1 tests of prompt and answer together" in note for note in source.report.notes)


def test_different_models_and_machines_are_said() -> None:
    said = " ".join(warnings(load_sources([MEASURED, LLAMA_BENCH])))
    assert "different models are compared" in said
    assert "different machines are compared" in said


def test_emulated_and_projected_are_told_apart(tmp_path: Path) -> None:
    emulated = variant(tmp_path, "emulated.json", provenance="emulated")
    projected = variant(tmp_path, "projected.json", provenance="projected")
    result = compare(MEASURED, emulated, projected, "--markdown")
    assert result.exit_code == 0
    kinds = [
        line.rsplit("|", 2)[1].strip() for line in result.stdout.splitlines() if "(emulated.json) |" in line
    ]
    assert kinds[0] == "emulated"
    assert "emulated, not measured on the board" in result.stdout
    assert "projected, not measured on the board" in result.stdout


def test_same_labels_get_their_reports_names(tmp_path: Path) -> None:
    other = variant(tmp_path, "other.json")
    names = [entry.name for entry in entries(load_sources([MEASURED, other]))]
    assert len(set(names)) == 4
    assert all(name.endswith(("(measured.json)", "(other.json)")) for name in names)
    twice = [entry.name for entry in entries(load_sources([MEASURED, MEASURED]))]
    assert len(set(twice)) == 4


def test_json_holds_every_run_whole() -> None:
    data = json.loads(compare(MEASURED, "--json").stdout)
    assert [run["run"] for run in data["runs"]] == json.loads(MEASURED.read_text())["runs"]
    assert {run["provenance"] for run in data["runs"]} == {"measured"}


def test_markdown_rows_have_as_many_cells_as_the_head() -> None:
    for block in compare(MEASURED, LLAMA_BENCH, "--markdown").stdout.split("### ")[1:]:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_columns_are_aligned_with_and_without_a_title() -> None:
    table = Table("", ("layer", "error"), (("0", "1.5%"), ("10", "12.5%")))
    lines = ["layer  error", "-----  -----", "0       1.5%", "10     12.5%"]
    assert as_text(table).splitlines() == lines
    assert as_text(dataclasses.replace(table, title="Loss")).splitlines() == ["Loss", *lines]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"avg_ts": "fast"}, "Expected `float`, got `str` - at `\\$\\[0\\]\\.avg_ts`"),
        ({"avg_ts": 0}, "`float` > 0"),
        ({"avg_ts": -1.5}, "`float` > 0"),
        ({"n_prompt": None}, "got `null` - at .*n_prompt"),
        ({"n_gen": True}, "got `bool` - at .*n_gen"),
        ({"n_depth": -4}, "`int` >= 0 - at .*n_depth"),
    ],
)
def test_damaged_llama_bench_files(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    data = json.loads(LLAMA_BENCH.read_text())
    data[0] |= edit
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load_sources([path])


def test_bad_files_leave_code_2_and_one_line(tmp_path: Path) -> None:
    newer = variant(tmp_path, "newer.json", version=99)
    cut = tmp_path / "cut.json"
    cut.write_text(MEASURED.read_text()[:500])
    for path in (newer, cut, tmp_path / "missing.json"):
        result = compare(MEASURED, path)
        assert isinstance(result.exception, InputError)
        assert result.exception.exit_code == 2
        assert "\n" not in str(result.exception)
        assert path.name in str(result.exception)


def test_page_is_not_overwritten_without_force(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    result = compare(MEASURED, "--html", page)
    assert isinstance(result.exception, InputError)
    assert page.read_text() == "mine"
    assert compare(MEASURED, "--html", page, "--force").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("highest", "last", "step"),
    [(37, 40, 10), (8192, 10000, 2000), (0.9, 1.0, 0.2), (100, 100, 20), (1e-4, 1e-4, 2e-5)],
)
def test_ticks_are_round_and_reach_the_top(highest: float, last: float, step: float) -> None:
    found = ticks(highest)
    assert found[-1] == pytest.approx(last)
    assert found[1] == pytest.approx(step)
    assert ticks(0) == ticks(float("nan")) == [0.0, 1.0]
