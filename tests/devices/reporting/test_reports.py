"""The published reports are readable, say what they are, and name no home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekv.devices.reporting.report import parse_report, read_json

REPORTS = sorted((Path(__file__).parents[3] / "devices/reports").glob("*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_published_report(path: Path) -> None:
    report = parse_report(read_json(path), path)
    assert (report.provenance == "projected") == path.stem.endswith("-projected")
    assert (report.provenance == "emulated") == (report.machine.emulator is not None)
    assert all(run.error is None for run in report.runs)
    assert not any(word.startswith(("/home/", "/root/", "/tmp/")) for word in report.command.split())
    assert all(run.model.sha256 for run in report.runs) or report.provenance == "projected"
