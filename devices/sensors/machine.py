"""What the machine is: board, cores, instruction set, memory, governor, and whether it is emulated."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgekv.devices.reporting.report import CoreGroup, Machine, Software
from edgekv.devices.sensors.cores import core_groups
from edgekv.host.isa import cpu_flags
from edgekv.host.proc import cpuinfo_blocks, meminfo_nbytes, read_text

# CPU features that llama.cpp's kernels choose by, under the names of /proc/cpuinfo.
ISA_FLAGS = frozenset(
    {"sse4_2", "avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
    | {"avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
    | {"neon", "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2", "sme", "v", "zvfh"}
)


def probe(root: Path = Path("/")) -> tuple[Machine, tuple[str, ...]]:
    """The machine, and notes on what it did not tell.

    `root` holds `proc` and `sys`. Reads files only; nothing here needs privileges.
    """
    notes: list[str] = []
    memory = meminfo(root)
    if "MemTotal" not in memory:
        notes.append("memory size unknown: /proc/meminfo could not be read")
    governor = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor is None:
        notes.append("CPU governor unknown: this machine shows no cpufreq in /sys")
    memory_type = _memory_type(root)
    if memory_type is None:
        notes.append("memory type unknown: no readable device tree or DMI entry tells it")
    emulated_by = emulator(root, platform.machine(), os.environ)
    machine = Machine(
        board=_board(root) if emulated_by is None else f"emulated {_emulated_core()}",
        soc=_soc(root),
        arch=platform.machine(),
        cores=core_groups(root) if emulated_by is None else _emulated_cores(root),
        isa_flags=isa_flags(root) if emulated_by is None else tuple(sorted(cpu_flags(root) & ISA_FLAGS)),
        ram_nbytes=memory.get("MemTotal"),
        available_nbytes=memory.get("MemAvailable"),
        swap_nbytes=memory.get("SwapTotal"),
        memory_type=memory_type,
        governor=governor,
        kernel=f"{platform.system()} {platform.release()}",
        emulator=emulated_by,
    )
    return machine, tuple(notes)


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none (psutil fills in the basics)."""
    found = meminfo_nbytes(root)
    if not found and root == Path("/"):
        import psutil

        virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
        return {"MemTotal": virtual.total, "MemAvailable": virtual.available, "SwapTotal": swap.total}
    return found


def isa_flags(root: Path = Path("/")) -> tuple[str, ...]:
    """The features that all cores share, out of those that matter to inference."""
    sets = []
    for block in cpuinfo_blocks(root).values():
        words = block.get("flags") or block.get("features") or ""
        sets.append(set(words.split()) & ISA_FLAGS)
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def emulator(root: Path, arch: str, environ: Mapping[str, str]) -> str | None:
    """Name the emulator if the CPU is not real.

    QEMU's user mode passes the host's /proc/cpuinfo through (before 8.1), so an Arm program sees an x86
    vendor there; QEMU_CPU is what chooses the emulated core. Full-system QEMU without KVM names itself.
    """
    blocks = cpuinfo_blocks(root)
    first = next(iter(blocks.values()), {})
    is_arm = arch.startswith(("aarch64", "arm"))
    if is_arm and "vendor_id" in first:
        return f"qemu-user ({environ.get('QEMU_CPU', 'default CPU')}) on {first.get('model name', 'x86')}"
    if is_arm and "QEMU_CPU" in environ:
        return f"qemu-user ({environ['QEMU_CPU']})"
    if "QEMU Virtual CPU" in first.get("model name", "") or "TCG" in first.get("model name", ""):
        return f"qemu-system ({first['model name']})"
    return None


def _emulated_core() -> str:
    return os.environ.get("QEMU_CPU", "CPU")


def _emulated_cores(root: Path) -> tuple[CoreGroup, ...]:
    """The host's cores under the emulated name, without the host's clock."""
    cpus = tuple(cpu for group in core_groups(root) for cpu in group.cpus)
    return (CoreGroup(cpus, _emulated_core(), None),)


def package_version(name: str) -> str | None:
    """Version of an installed Python package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def software(features: tuple[str, ...] = ()) -> Software:
    """The installed versions; `features` are what the llama.cpp build says it uses."""
    return Software(
        edgekv=package_version("edgekv"),
        python=platform.python_version(),
        llama_cpp=package_version("llama-cpp-python"),
        llama_cpp_features=features,
        onnxruntime=package_version("onnxruntime"),
    )


def _board(root: Path) -> str:
    model = read_text(root / "proc/device-tree/model") or read_text(
        root / "sys/firmware/devicetree/base/model"
    )
    if model:
        return model
    vendor = read_text(root / "sys/class/dmi/id/sys_vendor")
    product = read_text(root / "sys/class/dmi/id/product_name")
    if product:
        return f"{vendor} {product}".strip() if vendor else product
    groups = core_groups(root)
    return f"{platform.system()} computer, {sum(len(g.cpus) for g in groups)} x {groups[0].name}"


def _soc(root: Path) -> str | None:
    compatible = read_text(root / "proc/device-tree/compatible")
    if compatible:  # NUL-separated, the most special first; the last names the chip: "brcm,bcm2712"
        return compatible.split("\0")[-1].split(",")[-1].upper()
    return read_text(root / "sys/devices/soc0/soc_id")


def _memory_type(root: Path) -> str | None:
    """The DRAM type where a driver shows it (EDAC: /sys/devices/system/edac/mc/mc*/dimm*/dimm_mem_type)."""
    for path in sorted(root.glob("sys/devices/system/edac/mc/mc*/dimm*/dimm_mem_type")):
        if text := read_text(path):
            return text
    return None
