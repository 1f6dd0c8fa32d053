"""The tables of the documents: written from benchmarks/results, and in step with it."""

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
DOCUMENTS = ("BENCHMARKS.md", "docs/LOG.md", "docs/plan-accuracy.md")
KEYS = {"title", "date", "commit", "machine", "versions", "command", "columns", "rows", "notes"}


def tables(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a copy of the repository."""
    line = [sys.executable, str(root / "benchmarks" / "tables.py"), *options]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the script reads and writes, apart from the repository."""
    for name in (*DOCUMENTS, "benchmarks/tables.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_the_documents_are_in_step() -> None:
    done = tables(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_benchmarks_is_short() -> None:
    assert len((ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_changed_figure_is_noticed_and_written(copy: Path) -> None:
    path = copy / "benchmarks" / "results" / "loss.json"
    before = path.read_text(encoding="utf-8")
    assert before.count('"mean": 0.0289') == 1
    path.write_text(before.replace('"mean": 0.0289', '"mean": 0.0290'), encoding="utf-8")
    done = tables(copy, "--check")
    assert done.returncode == 1
    assert "BENCHMARKS.md is not in step" in done.stdout
    assert "0.0290 ± 0.0019" not in (copy / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert tables(copy).returncode == 0
    assert "0.0290 ± 0.0019" in (copy / "BENCHMARKS.md").read_text(encoding="utf-8")  # its last zero, too
    assert tables(copy, "--check").returncode == 0


def test_a_figure_changed_in_a_document_is_noticed(copy: Path) -> None:
    path = copy / "docs" / "LOG.md"
    path.write_text(path.read_text(encoding="utf-8").replace("0.0684 ±", "0.0584 ±"), encoding="utf-8")
    assert "docs/LOG.md is not in step" in tables(copy, "--check").stdout


def test_a_table_without_a_file_is_refused_by_name(copy: Path) -> None:
    (copy / "benchmarks" / "results" / "loss.json").rename(copy / "benchmarks" / "results" / "moved.json")
    done = tables(copy)
    assert done.returncode == 1
    assert "benchmarks/results/loss.json" in done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_when_where_and_how(path: Path) -> None:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == KEYS
    assert result["title"]
    assert result["notes"]
    assert isinstance(result["command"], list)
    assert result["command"] or "command" in result["notes"]  # what is missing is said
    assert result["machine"] or "machine" in result["notes"]
    columns = {column["key"] for column in result["columns"]}
    for row in (result, *result["rows"]):
        assert row.get("commit") is None or re.fullmatch("[0-9a-f]{7}", row["commit"])
        assert row.get("date") is None or re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
        assert ("date" in row) == ("commit" in row)
        if row.get("commit", "") is None:
            assert "not known" in result["notes"]
    for row in result["rows"]:
        assert columns <= set(row)


def test_every_result_is_in_a_document() -> None:
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    shown = set(re.findall(r"<!-- table: ([\w-]+)", texts))
    assert shown == {path.stem for path in RESULTS}


def test_the_errors_of_plan_are_those_of_its_rows() -> None:
    folder = ROOT / "benchmarks" / "results"
    with (folder / "plan-accuracy.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for what in json.loads((folder / "plan-accuracy.json").read_text(encoding="utf-8"))["rows"]:
        if what["machines"] != "all":
            continue
        for split, name in (("train", "fitted"), ("test", "held_out")):
            chosen = [row for row in rows if (row["what"], row["split"]) == (what["what"], split)]
            errors = [abs(float(row["error_percent"])) for row in chosen]
            assert len(errors) == what[f"{name}_rows"]
            assert statistics.median(errors) == pytest.approx(what[f"{name}_median_percent"], abs=0.1)
            assert max(errors) == pytest.approx(what[f"{name}_worst_percent"], abs=0.05)
