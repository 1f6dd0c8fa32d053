"""What a machine tells of itself: boards, cores, instruction sets, emulators; and what it does not tell."""

import platform
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgekv.devices.sensors.cores import core_groups
from edgekv.devices.sensors.machine import emulator, isa_flags, meminfo, probe
from edgekv.host.threads import allowed_cpus, parse_cpu_list

MakeRoot = Callable[[dict[str, str]], Path]


def test_big_and_little_cores(rk3588: Path) -> None:
    groups = core_groups(rk3588)
    assert [(g.name, g.cpus, g.max_mhz) for g in groups] == [
        ("Cortex-A76", (4, 5, 6, 7), 2352.0),
        ("Cortex-A55", (0, 1, 2, 3), 1800.0),
    ]


def test_board_soc_memory_governor(rk3588: Path) -> None:
    machine, notes = probe(rk3588)
    assert (machine.board, machine.soc, machine.governor) == ("Orange Pi 5", "RK3588", "ondemand")
    assert machine.ram_nbytes == 7928416 * 1024
    assert machine.available_nbytes == 7213004 * 1024
    assert machine.isa_flags == ("asimd", "asimddp", "asimdhp", "fphp")
    assert notes == ("memory type unknown: no readable device tree or DMI entry names it",)


def test_features_are_those_all_cores_share(make_root: MakeRoot) -> None:
    text = "processor : 0\nFeatures : asimd asimddp\n\nprocessor : 1\nFeatures : asimd\n"
    assert isa_flags(make_root({"proc/cpuinfo": text})) == ("asimd",)


def test_an_empty_machine_gives_notes_and_no_error(tmp_path: Path) -> None:
    machine, notes = probe(tmp_path)
    assert machine.ram_nbytes is None
    assert machine.governor is None
    assert any("memory size unknown" in note for note in notes)
    assert any("governor unknown" in note for note in notes)


def test_this_machine_agrees_with_psutil_and_platform() -> None:
    machine, _ = probe()
    assert machine.ram_nbytes == psutil.virtual_memory().total
    assert machine.arch == platform.machine()
    assert sum(len(g.cpus) for g in machine.cores) == psutil.cpu_count()
    assert set(allowed_cpus()) == set(psutil.Process().cpu_affinity())
    assert meminfo()["SwapTotal"] == psutil.swap_memory().total


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,6", (0, 1, 2, 3, 6)), ("5", (5,)), ("", ()), ("2,0-1\n", (0, 1, 2))]
)
def test_cpu_list(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "1--2", "0,-1"])
def test_bad_cpu_list(text: str) -> None:
    with pytest.raises(ValueError, match="not a CPU list"):
        parse_cpu_list(text)


def test_emulated_arm_is_told(make_root: MakeRoot) -> None:
    x86 = make_root({"proc/cpuinfo": "processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon\n"})
    assert emulator(x86, "aarch64", {"QEMU_CPU": "cortex-a53"}) == "qemu-user (cortex-a53) on Xeon"
    assert emulator(x86, "x86_64", {}) is None


def test_real_arm_is_not_called_emulated(rk3588: Path) -> None:
    assert emulator(rk3588, "aarch64", {}) is None
