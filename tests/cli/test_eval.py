"""`edgekv eval` as a user meets it: output, refusals, Ctrl-C, the time left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgekv.cli.common.progress import ProgressLine, clock

EDGEKV = str(Path(sys.executable).parent / "edgekv")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(np.random.default_rng(1).choice(list("aeinorst .\n"), 40_000)))
    return path


@pytest.fixture(scope="module")
def piqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "piqa.jsonl"
    row = {"query": "how?", "choices": ["like so", "not at all"], "gold": 0}
    path.write_text("\n".join(json.dumps(row | {"gold": i % 2}) for i in range(6)) + "\n")
    return path


def test_everything_at_once(
    edgekv: Callable, tiny_llama: Path, tiny_mla: Path, text: Path, piqa: Path, tmp_path: Path
) -> None:
    """All four measures in one document; the same as lines; the second time from the journals."""
    call = ["eval", tiny_mla, "--against", tiny_llama, "--text", text, "--window", 64, "--limit", 3,
            "--task", f"piqa={piqa}", "--task", f"arc_easy={piqa}", "--sequences", 2,
            "--measure", "windows,positions,needles", "--trials", 1, "--ctx-size", 1400, "-j", 1, "-t", 1,
            "--cache-dir", tmp_path]  # fmt: skip
    result = edgekv(*call, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["command"].startswith(f"edgekv eval {tiny_mla} --against")
    assert report["windows"]["windows"] == 3
    assert [task["questions"] for task in report["tasks"]] == [3, 3]
    assert report["positions"]["context"] == 1400
    assert report["positions"]["sequences"] == 2
    assert len(report["retrieval"]["cells"]) == 20
    assert {cell["trials"] for cell in report["retrieval"]["cells"]} == {1}
    journals = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "note: measured up to 1400 tokens, trained for 512" in result.stderr
    shown = edgekv(*call).stdout
    assert "note: measured up to 1400 tokens, trained for 512" in shown
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == journals
    assert f"KL          {report['windows']['kl']:.6f}" in shown
    assert "mean relative change over 2 tasks" in shown
    for length in (175, 350, 700, 1400):
        assert f"\n  {length:>6} " in shown
    for bucket in report["positions"]["buckets"]:
        assert f"{bucket['ppl']:9.4f}, reference {bucket['reference_ppl']:9.4f}" in shown


def test_ruler_with_a_budget(edgekv: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    """Tasks of a text that ships, in a cache of 200 tokens."""
    call = ["eval", tiny_llama, "--backend", "reference", "--measure", "ruler", "--lengths", "640", "--trials", 1,
            "-j", 1, "--cache-dir", tmp_path, "--policy", "critical-keydiff"]  # fmt: skip
    result = edgekv(*call, "--kinds", "vt,niah_multikey_1", "--budget", 200, "--see-question", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"]["eviction"]["policy"] == "critical-keydiff"
    assert report["model"]["eviction"]["budget"] == 200
    assert [cell["kind"] for cell in report["ruler"]["cells"]] == ["vt", "niah_multikey_1"]
    assert "at most 200 tokens by critical-keydiff" in result.stderr
    assert "note: measured up to 640 tokens, trained for 512" in result.stderr
    assert "mean of 2" in result.stderr
    assert "'thought' is no kind of task" in edgekv(*call, "--budget", 64, "--kinds", "thought").stderr


def test_what_is_refused(
    refused: Callable,
    tiny_llama: Path,
    tiny_mla: Path,
    smollm2: Path,
    text: Path,
    piqa: Path,
    tmp_path: Path,
) -> None:
    where = ("--cache-dir", tmp_path, "-j", 1)
    assert "no such file" in refused("eval", tmp_path / "none.gguf", "--text", text, *where)
    assert "unknown cache type" in refused(
        "eval", tiny_llama, "--text", text, "--window", 64, "--cache-type", "q9", *where
    )
    pair = ("--text", text, "--window", 64, "--cache-type", "q8_0/q4_0")
    assert "one row per token" in refused("eval", tiny_mla, *pair, *where)
    assert "unknown task" in refused("eval", tiny_llama, "--task", f"mmlu={piqa}", *where)
    assert "line 1" in refused("eval", tiny_llama, "--task", f"winogrande={piqa}", *where)
    assert "different vocabularies" in refused("eval", tiny_llama, "--against", smollm2, "--text", text)
    assert "shorten --window" in refused("eval", tiny_llama, "--text", text, "--window", 90_000, *where)
    assert "shorten --ctx-size" in refused(
        "eval", tiny_llama, "--text", text, "--measure", "needles", "--ctx-size", 90_000, *where
    )
    assert "caches in f32, not q8_0" in refused(
        "eval", tiny_llama, "--text", text, "--backend", "reference", "--cache-type", "q8_0", *where
    )


def test_a_folder_that_cannot_be_written(
    edgekv: Callable, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = edgekv(
        "eval", tiny_llama, "--text", text, "--window", 64, "--cache-dir", tmp_path / "file", "-j", 1
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("choose another --cache-dir")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "Missing argument 'MODEL'"),
        (["--sweep", "s.toml"], "it is the command `edgekv sweep FILE`"),
        (["m.gguf", "--positions", "b.txt"], "it is --text FILE --measure positions"),
        (["m.gguf", "--text", "t.txt", "--measure", "retrieval"], "'retrieval' is not one of"),
        (["m.gguf", "--task", "piqa"], "is not NAME=FILE"),
    ],
)
def test_options_that_are_refused(edgekv: Callable, arguments: list[str], problem: str) -> None:
    result = edgekv("eval", *arguments)
    assert result.returncode == 2
    assert problem in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_no_workers_and_what_is_done(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [EDGEKV, "eval", str(tiny_llama), "--text", str(text), "--window", "64", "-j", "2", "-t", "2",
         "--cache-dir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # tests started in the background ignore SIGINT, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(path.read_bytes().count(b"\n") > 10 for path in tmp_path.glob("windows-*")):
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    (journal,) = tmp_path.glob("windows-*")
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_the_time_left_is_of_this_runs_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 were done by an earlier run; 10 more took 40 s, so 90 more will take 6 minutes."""
    now = [1000.0]
    monkeypatch.setattr("edgekv.cli.common.progress.time.monotonic", lambda: now[0])
    line = ProgressLine("windows")
    line(100, 200, "")
    now[0] += 40
    line(110, 200, "PPL 9.000")
    now[0] += 1
    line(111, 200, "too soon after the last line")
    now[0] += 400
    line(200, 200, "")
    assert capsys.readouterr().err.splitlines() == ["windows 110/200, 6:00 left  PPL 9.000"]


def test_clock() -> None:
    assert [clock(s) for s in (0.4, 59.6, 754, 7384)] == ["0:00", "1:00", "12:34", "2:03:04"]
