"""Reading and writing reports: round trip, schema, and every way in which a report can be bad."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from edgekv.devices.reporting.report import VERSION, Report, Stat, dumps, parse_report, read_json
from edgekv.errors import InputError

HERE = Path(__file__).parent
SCHEMA = HERE.parents[2] / "devices/reporting/report.schema.json"
REPORT = HERE / "reports/measured.json"


def load_report(path: Path) -> Report:
    return parse_report(read_json(path), path)


@pytest.fixture
def data() -> Any:
    return json.loads(REPORT.read_text())


def test_round_trip(tmp_path: Path) -> None:
    report = load_report(REPORT)
    again = tmp_path / "again.json"
    again.write_text(dumps(report))
    assert again.read_bytes() == REPORT.read_bytes()
    assert load_report(again) == report


def test_the_published_schema_is_the_one_that_the_code_follows() -> None:
    """Write anew what this finds different: `json.dumps(wanted, indent=1)`."""
    wanted = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:edgekv:report:{VERSION}",
        "title": f"EdgeKV report, version {VERSION}",
        **msgspec.json.schema(Report),
    }
    assert json.loads(SCHEMA.read_text()) == json.loads(json.dumps(wanted))
    jsonschema.Draft202012Validator.check_schema(wanted)


def test_schema_and_reader_agree(data: Any) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert validator.is_valid(data)
    data["runs"][0]["cache"]["surprise"] = 1
    assert not validator.is_valid(data)


Edit = Callable[[Any], None]


def edit(path: str, value: Any) -> Edit:
    """An edit that sets the value at a dotted path."""

    def apply(data: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("version", VERSION + 1), "pip install -U edgekv"),
        (edit("version", "1"), "version: expected `int`, got `str`"),
        (edit("version", 0), "version: expected `int` >= 1"),
        (edit("format", "something"), "not an EdgeKV report"),
        (edit("runs", []), "runs: expected `array` of length >= 1"),
        (edit("runs", {}), "runs: expected `array`, got `object`"),
        (edit("runs.0.points.0.depth", "many"), r"runs\[0\]\.points\[0\]\.depth: expected `int`, got `str`"),
        (edit("runs.0.points.0.depth", -5), "depth: expected `int` >= 0"),
        (edit("runs.0.points.0.depth", True), "depth"),
        (edit("runs.0.points.0.decode_tps.median", 0), r"points\[0\]\.decode_tps: .*positive"),
        (edit("runs.0.points.0.decode_tps.median", -3.0), "decode_tps"),
        (edit("runs.0.points.0.decode_tps.low", 1e9), "does not hold"),
        (edit("runs.0.points.0.decode_tps.samples", [1, None]), r"samples\[1\]"),
        (edit("runs.0.points.0.decode_tps.samples", [float("nan")]), "not valid JSON"),
        (
            edit("runs.0.memory.peak_rss_nbytes", 0),
            r"runs\[0\]\.memory\.peak_rss_nbytes: expected `int` >= 1",
        ),
        (edit("runs.0.cache.type", ...), r"runs\[0\]\.cache\.type: missing"),
        (edit("runs.0.sped", 12), r"runs\[0\]\.sped: unknown key"),
        (edit("provenance", "dreamt"), "provenance: 'dreamt' is not one of measured, emulated"),
        (edit("machine", None), "machine: expected `object`, got `null`"),
        (edit("runs.1.label", "a"), ""),
    ],
)
def test_edited_reports_are_refused_with_the_place(
    tmp_path: Path, data: Any, change: Edit, message: str
) -> None:
    change(data)
    if not message:
        data["runs"][0]["label"] = "a"
        message = "same label"
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        load_report(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_truncated_anywhere(tmp_path: Path) -> None:
    text = REPORT.read_text()
    path = tmp_path / "cut.json"
    for share in range(20):
        path.write_text(text[: len(text) * share // 20])
        with pytest.raises(InputError, match=r"cut\.json"):
            load_report(path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b'{"a": "\xff"}', b"[" * 200_000, b"null", b"[]", b"3", b'{"a": 1}', b"[1e999]"],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.json"):
        load_report(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_report(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        load_report(tmp_path)


def test_stat() -> None:
    stat = Stat.of([3.0, 1.0, 2.0])
    assert (stat.median, stat.low, stat.high, stat.spread) == (2.0, 1.0, 3.0, 1.0)


def test_decoding_does_not_change_its_input(data: Any) -> None:
    before = copy.deepcopy(data)
    load_report(REPORT)
    assert data == before
