"""The doctor: every kind of trouble it exists for, on files as machines have them and in real processes."""

import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.devices.bench.worker import WorkerProcess
from edgekv.devices.doctor import checks as doctor
from edgekv.devices.doctor.check import Check
from edgekv.devices.doctor.comfort import LADDER
from edgekv.errors import BackendError
from edgekv.host import isa
from edgekv.host.isa import MIN_COUNT, arm_flags_used, cpu_flags, engine_library, missing_features

MakeRoot = Callable[[dict[str, str]], Path]
PI4_FLAGS = {"fp", "asimd", "evtstrm", "crc32", "cpuid"}
PI5_FLAGS = PI4_FLAGS | {"asimdhp", "asimddp", "fphp", "aes", "atomics"}
SDOT = 0x4E829420  # sdot v0.4s, v1.16b, v2.16b
SMMLA = 0x4E82A420  # smmla v0.4s, v1.16b, v2.16b
FMLA_H = 0x4E420C20  # fmla v0.8h, v1.8h, v2.8h
NOP = 0xD503201F


def elf(words: list[int], machine: int = 183) -> bytes:
    """A minimal ELF-64 library with one executable segment of these instructions."""
    code = struct.pack(f"<{len(words)}I", *words)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0, len(code), len(code), 4)
    return header + program + code


def test_a_dotprod_build_on_a_pi_4_is_found_before_it_runs() -> None:
    library = elf([NOP] * 10 + [SDOT] * MIN_COUNT)
    assert arm_flags_used(library) == {"asimddp"}
    assert arm_flags_used(library) - PI4_FLAGS == {"asimddp"}
    assert arm_flags_used(library) - PI5_FLAGS == set()


def test_instructions_of_newer_cores() -> None:
    assert arm_flags_used(elf([SMMLA] * MIN_COUNT + [FMLA_H] * MIN_COUNT)) == {"i8mm", "asimdhp"}
    assert arm_flags_used(elf([SDOT] * (MIN_COUNT - 1))) == set()  # a constant that looks like one
    assert arm_flags_used(elf([NOP] * 100)) == set()
    assert arm_flags_used(elf([SDOT] * 100, machine=62)) == set()  # x86
    assert arm_flags_used(b"not a library") == set()


def auxv(hwcap: int, hwcap2: int = 0) -> bytes:
    """An auxiliary vector as the kernel of an Arm board writes it."""
    return struct.pack("<8Q", 6, 4096, 16, hwcap, 26, hwcap2, 0, 0)


def test_an_arm_program_asks_its_auxiliary_vector_and_not_the_hosts_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nflags : avx2 asimddp\n")
    (tmp_path / "proc/self/auxv").write_bytes(auxv(0x8FF))  # a Cortex-A72
    assert cpu_flags(tmp_path, "aarch64") == {"asimd", "crc32"}
    (tmp_path / "proc/self/auxv").write_bytes(auxv(0x119FFF, 1 << 13))
    assert cpu_flags(tmp_path, "aarch64") == {"asimd", "crc32", "fphp", "asimdhp", "asimddp", "i8mm"}
    assert cpu_flags(tmp_path, "x86_64") == {"avx2", "asimddp"}
    (tmp_path / "proc/self/auxv").unlink()
    assert cpu_flags(tmp_path, "aarch64") == {"avx2", "asimddp"}


def test_a_build_for_another_core_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(elf([SDOT] * MIN_COUNT))
    (tmp_path / "proc/self").mkdir(parents=True)
    monkeypatch.setattr(isa, "engine_library", lambda: library)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    (tmp_path / "proc/self/auxv").write_bytes(auxv(0x8FF))
    with pytest.raises(BackendError, match=r"built for a CPU with asimddp.*GGML_CPU_ARM_ARCH=armv8-a"):
        isa.require_runnable(tmp_path)
    (tmp_path / "proc/self/auxv").write_bytes(auxv(1 << 20))
    isa.require_runnable(tmp_path)


def test_features_of_the_build_against_the_cpu() -> None:
    assert missing_features(["NEON", "DOTPROD", "REPACK"], PI4_FLAGS) == ["DOTPROD"]
    assert missing_features(["AVX2", "AVX512", "OPENMP"], {"avx", "avx2"}) == ["AVX512"]
    assert missing_features(["NEON", "FP16_VA", "DOTPROD"], PI5_FLAGS) == []


def test_the_engine_of_this_machine_runs_here() -> None:
    library = engine_library()
    assert library is not None
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert doctor.check_engine().status == "ok"


def test_an_illegal_instruction_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = WorkerProcess.ask

    def die(self: WorkerProcess, do: str, **arguments: object) -> object:
        os.kill(self.pid, signal.SIGILL)
        return ask(self, do, **arguments)

    monkeypatch.setattr(WorkerProcess, "ask", die)
    check = doctor.check_engine()
    assert check.status == "fail"
    assert "illegal instruction" in check.found
    assert "--no-binary llama-cpp-python" in check.advice


def test_missing_extras_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["llama-cpp-python"].status == "warn"
    assert "ONNX folders run without it" in by_name["llama-cpp-python"].advice
    assert by_name["torch"].status == "warn"
    assert by_name["torch"].advice == "for healing a conversion: pip install 'edgekv[heal]'"


def test_low_memory_and_no_swap(make_root: MakeRoot) -> None:
    root = make_root({"proc/meminfo": "MemTotal: 427008 kB\nMemAvailable: 90000 kB\nSwapTotal: 0 kB\n"})
    memory, swap = doctor.check_memory(root)
    assert memory.status == "fail"
    assert swap.status == "warn"
    assert "zram" in swap.advice


def test_a_containers_limit_counts(make_root: MakeRoot) -> None:
    root = make_root(
        {
            "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\nSwapTotal: 100 kB\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(128 << 20),
        }
    )
    memory, _ = doctor.check_memory(root)
    assert memory.status == "fail"
    assert "128 MiB" in memory.found


def test_unreadable_sensors_are_unknown_and_not_fine(tmp_path: Path) -> None:
    assert [check.status for check in doctor.check_memory(tmp_path)] == ["unknown"]
    assert [check.status for check in doctor.check_heat(tmp_path)] == ["unknown", "unknown"]


@pytest.mark.parametrize(
    ("bits", "status", "word"),
    [("0", "ok", "none"), ("50005", "fail", "under-voltage now"), ("40000", "warn", "since boot")],
)
def test_a_pis_throttling(make_root: MakeRoot, bits: str, status: str, word: str) -> None:
    root = make_root({"sys/devices/platform/soc/soc:firmware/get_throttled": bits})
    _, throttling = doctor.check_heat(root)
    assert throttling.status == status
    assert word in throttling.found


def test_a_hot_board(make_root: MakeRoot) -> None:
    root = make_root(
        {"sys/class/thermal/thermal_zone0/temp": "82000", "sys/class/thermal/thermal_zone0/type": "cpu"}
    )
    assert doctor.check_heat(root)[0].status == "warn"


def test_exit_code_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [Check("a", "ok", "x"), Check("b", "warn", "y", "do"), Check("c", "unknown", "z")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0
    assert "-> do" in result.stdout
    monkeypatch.setattr(doctor, "examine", lambda: [*fine, Check("d", "fail", "broken", "mend")])
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ready"] is False


def test_this_machine_whole() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json"], catch_exceptions=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["python"]["status"] == "ok"
    assert checks["llama-cpp-python"]["status"] == "ok"
    assert checks["comfortable model"]["found"]


def test_the_ladder_climbs() -> None:
    sizes = [model.weights_nbytes for model in LADDER]
    assert sizes == sorted(sizes)
    for model in LADDER:
        assert 0 < model.read_nbytes <= model.weights_nbytes
        assert model.weights_nbytes == pytest.approx(model.flops / 2 * 4.5 / 8, rel=0.35)
