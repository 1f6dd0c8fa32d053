"""NVIDIA cards: without the package, without a driver, and through NVIDIA's package on a driver of our own making."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.devices.sensors.energy import find_sources
from edgekv.devices.sensors.nvml import ask, first_card, missing_package, power_readers

MakeRoot = Callable[[dict[str, str]], Path]
DRIVER = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86\n"}

# Two cards (nvml.h): only the first has an energy counter, which rises by 2.5 J at each look.
STUB = r"""
#include <stdint.h>
#include <stdio.h>
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, uintptr_t *card) { *card = i + 1; return i < 2 ? 0 : 2; }
int nvmlDeviceGetName(uintptr_t card, char *name, unsigned size) {
  return card ? (snprintf(name, size, "Card %d", (int)card), 0) : 2; }
int nvmlDeviceGetMemoryInfo(uintptr_t card, uint64_t *sizes) {
  sizes[0] = 8ull << 30; sizes[1] = 5ull << 30; sizes[2] = card << 30; return card ? 0 : 2; }
int nvmlDeviceGetTotalEnergyConsumption(uintptr_t card, uint64_t *millijoules) {
  static uint64_t used; *millijoules = used += card == 1 ? 2500 : 0; return card == 1 ? 0 : 3; }
int nvmlDeviceGetPowerUsage(uintptr_t card, unsigned *milliwatts) { *milliwatts = 70500; return 0; }
"""
PROGRAM = """
import json, dataclasses
from edgekv.devices.sensors.energy import find_sources
from edgekv.devices.sensors.nvml import first_card
card = first_card()
found = [(s.name, s.is_counter, s.read()) for s in find_sources()[0] if s.name.startswith("NVML")]
print(json.dumps([card and dataclasses.astuple(card), found]))
"""


def test_without_the_package_nothing_is_told(monkeypatch: pytest.MonkeyPatch, make_root: MakeRoot) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert ask("nvmlDeviceGetCount") is None
    assert first_card() is None
    assert list(power_readers()) == []


def test_a_driver_without_the_package_is_a_note(
    monkeypatch: pytest.MonkeyPatch, make_root: MakeRoot, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgekv.devices.sensors.nvml.find_spec", lambda name: None)
    _, notes = find_sources(make_root(DRIVER))
    assert notes == ("memory and energy of the NVIDIA card unknown: pip install 'edgekv[nvidia]'",)
    assert missing_package(tmp_path) == ()  # no driver


def test_with_the_package_a_driver_needs_no_note(make_root: MakeRoot) -> None:
    pytest.importorskip("pynvml")
    assert missing_package(make_root(DRIVER)) == ()


def test_without_a_driver_nothing_is_told(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    assert told(tmp_path) == [None, []]


@pytest.mark.parametrize(("visible", "card"), [("", 1), ("1,0", 2), ("2", None)])
def test_what_a_driver_tells(tmp_path: Path, visible: str, card: int | None) -> None:
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "stub.c"], check=True)
    first, sources = told(tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert first == (card and [f"Card {card}", 8 << 30, card << 30])
    assert sources == [["NVML GPU 0", True, 5.0], ["NVML GPU 1", False, 70.5]]


def told(libraries: Path, **environ: str) -> Any:
    """The first card and the energy sources in a process that looks for the driver's library in a folder first."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)
