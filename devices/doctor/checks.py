"""Checks whether this machine is ready, one per function: what was found, and what to do about it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekv.backends.llama_cpp.kernel.build import COMPILERS, built_path
from edgekv.devices.bench.worker import WorkerProcess
from edgekv.devices.doctor.check import Check
from edgekv.devices.doctor.comfort import check_comfort
from edgekv.devices.predict.plan import MIB
from edgekv.devices.sensors.health import read_health
from edgekv.devices.sensors.machine import meminfo, package_version, probe
from edgekv.errors import BackendError
from edgekv.host.isa import REBUILD, arm_flags_used, cpu_flags, engine_library, missing_features
from edgekv.host.load import Load, load_now, waiting_share
from edgekv.host.memory import memory_limit_nbytes
from edgekv.host.threads import allowed_cpus, cpu_quota

MIN_RAM_NBYTES = 200 * MIB  # the runtime, the smallest model and its buffers
HOT_C = 75.0


def examine() -> list[Check]:
    """All checks, in the order in which trouble would show."""
    system = [check_python(), *check_packages(), check_wheels(), check_engine(), check_kernel()]
    cores = [check_cores(), check_load(load_now(), waiting_share()), check_governor()]
    return [*system, *check_memory(), *cores, *check_heat(), check_comfort()]


def check_python() -> Check:
    """Version and word size."""
    bits = 64 if sys.maxsize > 2**32 else 32
    found = f"Python {platform.python_version()}, {platform.machine()}, {bits} bit"
    if bits == 32:
        return Check("python", "fail", found, "install a 64-bit system: models and wheels need it")
    return Check("python", "ok", found)


EXTRAS = {  # package: (import name, extra, what it is for)
    "llama-cpp-python": ("llama_cpp", "llama", "running GGUF files (ONNX folders run without it)"),
    "onnx": ("onnx", "onnx", "ONNX export"),
    "torch": ("torch", "heal", "healing a conversion"),
    "matplotlib": ("matplotlib", "plot", "plots"),
}


def check_packages() -> list[Check]:
    """Extras that are missing, with the command that installs them."""
    found = []
    for package, (module, extra, use) in EXTRAS.items():
        version = package_version(package)
        if version and importlib.util.find_spec(module):
            found.append(Check(package, "ok", version))
        else:
            advice = f"for {use}: pip install 'edgekv[{extra}]'"
            found.append(Check(package, "warn", "not installed", advice))
    return found


# Wheels on PyPI as of numpy 2.4, onnxruntime 1.32, tokenizers 0.23, safetensors 0.8, psutil 7.2.
_ALL = ("numpy", "onnxruntime", "tokenizers", "safetensors", "psutil")
WHEELS = {
    **dict.fromkeys([("x86_64", "glibc"), ("aarch64", "glibc")], _ALL),
    **dict.fromkeys([("x86_64", "musl"), ("aarch64", "musl")], ("numpy", *_ALL[2:])),
    ("armv7l", "glibc"): ("tokenizers", "safetensors"),
}


def check_wheels() -> Check:
    """Wheels on PyPI for this platform, and whether the rest can be compiled."""
    libc = "glibc" if platform.libc_ver()[0] == "glibc" else "musl"
    wheels = WHEELS.get((platform.machine(), libc))
    where = f"{platform.machine()} {libc}"
    tools = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    missing = f"; {' and '.join(tools)} not found" if tools else ""
    if wheels is None:
        advice = "`pip install` shows what it has to compile"
        return Check("wheels", "unknown", f"{where}: no list for this platform", advice)
    found = f"{where}: {', '.join(wheels)}; llama-cpp-python is compiled{missing}"
    if absent := sorted(set(_ALL) - set(wheels)):
        advice = f"no wheel of {', '.join(absent)}: pip compiles it, or use a 64-bit glibc system"
        return Check("wheels", "warn", found, advice)
    if tools and package_version("llama-cpp-python") is None:
        return Check("wheels", "warn", found, "apt-get install build-essential cmake")
    return Check("wheels", "ok", found)


def check_engine() -> Check:
    """Whether the llama.cpp build runs on this CPU; its code is only executed in a child process."""
    name, library = "llama.cpp on this CPU", engine_library()
    if library is None:
        return Check(name, "unknown", "llama.cpp is not installed", "see llama-cpp-python above")
    flags = cpu_flags()
    used = arm_flags_used(library.read_bytes())
    lacking = sorted(flag for flag in used if flag not in flags) if flags else []
    features: list[str] = []
    if not lacking:
        try:
            with WorkerProcess("llama.cpp") as worker:
                features = worker.ask("engine_features")
        except BackendError as error:
            return Check(name, "fail", str(error), REBUILD)
        lacking = missing_features(features, flags) if flags else []
    if lacking:
        words = ", ".join(lacking)
        found = f"the build uses {words}, which this CPU lacks: it dies of an illegal instruction"
        return Check(name, "fail", found, REBUILD)
    used_words = " ".join(features)
    if not flags:
        return Check(name, "unknown", f"the build uses {used_words}; the CPU's flags are not readable")
    return Check(name, "ok", f"build uses {used_words}; the CPU has them")


def check_kernel() -> Check:
    """Whether EdgeKV's attention kernel is built for this machine and this llama.cpp."""
    name = "attention kernel"
    if engine_library() is None:
        return Check(name, "unknown", "llama.cpp is not installed")
    if built_path():
        return Check(name, "ok", "built")
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        return Check(
            name,
            "warn",
            "not built, and there is no C++ compiler",
            "apt-get install g++, then: edgekv kernel",
        )
    return Check(
        name, "warn", "not built: decoding slows down with a long cache", "edgekv kernel (takes seconds)"
    )


def check_memory(root: Path = Path("/")) -> list[Check]:
    """RAM, the cgroup's limit on it, and swap."""
    memory = meminfo(root)
    if "MemTotal" not in memory or "MemAvailable" not in memory:
        return [Check("memory", "unknown", "/proc/meminfo could not be read")]
    total, free = memory["MemTotal"], memory["MemAvailable"]
    found = f"{free / MIB:,.0f} of {total / MIB:,.0f} MiB available"
    limit = memory_limit_nbytes(root)
    if limit is not None and limit < free:
        found, free = f"{found}, but the container may use {limit / MIB:,.0f} MiB", limit
    low = free < MIN_RAM_NBYTES
    advice = f"close programs: the smallest model needs about {MIN_RAM_NBYTES / MIB:.0f} MiB" if low else ""
    swap = memory.get("SwapTotal", 0)
    swap_check = Check("swap", "ok", f"{swap / MIB:,.0f} MiB")
    if swap == 0 and total < 4 * 2**30:
        add_zram = "a tight fit ends in the OOM killer: add zram (apt-get install zram-tools)"
        swap_check = Check("swap", "warn", "none", add_zram)
    return [Check("memory", "fail" if low else "ok", found, advice), swap_check]


def check_cores() -> Check:
    """Cores, and whether this process may use them."""
    machine, _ = probe()
    kinds = ", ".join(f"{len(group.cpus)} x {group.name}" for group in machine.cores)
    quota = cpu_quota()
    if quota is not None and quota < len(allowed_cpus()):
        found = f"{kinds}; the container may use {quota:g}"
        return Check("cores", "warn", found, "raise its CPU quota for more speed")
    if machine.emulator:
        found = f"{kinds}; emulated by {machine.emulator}"
        return Check("cores", "warn", found, "do not take its times for a real board's")
    return Check("cores", "ok", f"{kinds}; {len(allowed_cpus())} usable")


def check_load(load: Load | None, waiting: float | None) -> Check:
    """Other work on the same cores, which slows llama.cpp's threads by more than its share."""
    if load is None:
        return Check("load", "unknown", "this machine does not tell what its CPUs do (/proc/stat)")
    found = load.words() + (
        "" if waiting is None else f"; a task waited for one {waiting:.0%} of the last 10 s"
    )
    if load.busy:
        return Check("load", "warn", found, "end other programs: llama.cpp's threads wait for each other")
    return Check("load", "ok", found)


def check_governor() -> Check:
    """A governor that keeps the clock down slows decoding."""
    governor = probe()[0].governor
    if governor is None:
        return Check("governor", "unknown", "this machine shows no cpufreq in /sys")
    slow = governor in ("powersave", "conservative")
    if slow and not Path("/sys/devices/system/cpu/intel_pstate").exists():
        return Check("governor", "warn", governor, "sudo cpupower frequency-set -g performance")
    return Check("governor", "ok", governor)


def check_heat(root: Path = Path("/")) -> list[Check]:
    """Temperature and throttling."""
    health = read_health(root)
    return [_check_temperature(health.temperature_c), _check_throttling(health.throttling)]


def _check_temperature(celsius: Mapping[str, float]) -> Check:
    if not celsius:
        return Check("temperature", "unknown", "no thermal sensor could be read")
    name, hottest = max(celsius.items(), key=lambda item: item[1])
    found = f"{hottest:.0f} C ({name})"
    return (
        Check("temperature", "warn", found, "cool it")
        if hottest >= HOT_C
        else Check("temperature", "ok", found)
    )


def _check_throttling(words: Sequence[str] | None) -> Check:
    if not words:
        unknown = Check("throttling", "unknown", "no throttling counter could be read")
        return unknown if words is None else Check("throttling", "ok", "none")
    voltage = any("under-voltage" in text for text in words)
    advice = "use the board's own power supply and a short cable" if voltage else "improve cooling"
    now = any(text.endswith("now") for text in words)
    return Check("throttling", "fail" if now else "warn", ", ".join(words), advice)


def is_ready(checks: Sequence[Check]) -> bool:
    """Nothing failed; warnings and unknowns are allowed."""
    return all(check.status != "fail" for check in checks)
