"""Other programs' share of CPU time, from made-up counters and against psutil."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from edgekv.devices.doctor.checks import check_load
from edgekv.host import load as module
from edgekv.host.load import Load, LoadMeter, waiting_share


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_S", 0.0)


def write(root: Path, cpus: dict[int, str], processes: dict[int, tuple[int, ...]]) -> Path:
    """CPU counters user nice system idle iowait irq softirq steal; processes' utime stime cutime cstime."""
    lines = [
        "cpu  1 2 3 4",
        *(f"cpu{number} {counts}" for number, counts in cpus.items()),
        "intr 5",
        "ctxt 6",
    ]
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text("\n".join(lines) + "\n")
    for pid, ticks in processes.items():
        (root / f"proc/{pid}").mkdir(exist_ok=True)
        fields = ["R", *"0" * 10, *map(str, ticks), "20", "0"]
        (root / f"proc/{pid}/stat").write_text(f"{pid} (a ) name) {' '.join(fields)}\n")
    return root


def test_what_is_not_this_programs_is_others(tmp_path: Path) -> None:
    me, engine = os.getpid(), 999_999
    root = write(tmp_path, {0: "0 0 0 0 0 0 0 0", 1: "5 0 0 5 0 0 0 0"}, {me: (1, 1, 1, 1), engine: (0,) * 4})
    meter = LoadMeter([engine], (0, 1), root)
    write(
        root, {0: "40 10 10 20 10 5 5 0", 1: "65 0 0 25 0 0 0 20"}, {me: (5, 1, 4, 1), engine: (53, 0, 0, 0)}
    )
    # 200 ticks: 130 used, of which 7 and 53 are its own, 20 stolen
    assert meter.read() == Load(70 / 200, 20 / 200, 2)
    assert LoadMeter([], (0,), root).read() is None  # no time has passed
    root = write(tmp_path, {}, {})
    assert LoadMeter([], (0,), root).read() is None


def test_only_the_cpus_that_are_used_count(tmp_path: Path) -> None:
    root = write(tmp_path, {0: "0 0 0 0", 10: "0 0 0 0"}, {})
    meter = LoadMeter([], (0,), root)
    write(root, {0: "10 0 0 90", 10: "100 0 0 0"}, {})  # old kernels have fewer fields
    assert meter.read() == Load(0.1, 0.0, 1)


def test_a_process_that_ended_counts_as_its_parents(tmp_path: Path) -> None:
    me, child = os.getpid(), 999_998
    root = write(tmp_path, {0: "0 0 0 0"}, {me: (0, 0, 0, 0), child: (0, 0, 0, 0)})
    meter = LoadMeter([child], (0,), root)
    (root / f"proc/{child}/stat").unlink()
    write(root, {0: "50 0 0 50"}, {me: (10, 0, 30, 10)})
    assert meter.read() == Load(0.0, 0.0, 1)


def test_the_counters_are_psutils() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc")
    meter = LoadMeter()
    ticks = meter._first
    seconds = [psutil.cpu_times(percpu=True)[cpu] for cpu in meter._cpus]
    hz = os.sysconf("SC_CLK_TCK")
    used = sum(cpu.user + cpu.nice + cpu.system + cpu.irq + cpu.softirq for cpu in seconds)
    assert ticks.used / hz == pytest.approx(used, abs=1.0)
    own = psutil.Process().cpu_times()
    mine = own.user + own.system + own.children_user + own.children_system
    assert ticks.own[os.getpid()] / hz == pytest.approx(mine, abs=0.5)


@pytest.mark.parametrize(
    ("load", "status", "words"),
    [
        (None, "unknown", "does not tell"),
        (Load(0.02, 0.0, 4), "ok", "other programs took 2% of the time of 4 CPUs"),
        (Load(0.45, 0.0, 2), "warn", "other programs took 45% of the time of 2 CPUs"),
        (Load(0.001, 0.3, 2), "warn", "the host took 30% of the time of 2 CPUs"),
        (Load(0.06, 0.05, 2), "warn", "other programs took 6% and the host took 5% of the time of 2 CPUs"),
    ],
)
def test_doctor_says_whose_the_machine_is(load: Load | None, status: str, words: str, tmp_path: Path) -> None:
    check = check_load(load, None)
    assert check.status == status
    assert words in check.found
    assert waiting_share(tmp_path) is None
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/cpu").write_text("some avg10=34.10 avg60=1.00 avg300=0.00 total=5\n")
    assert waiting_share(tmp_path) == pytest.approx(0.341)
