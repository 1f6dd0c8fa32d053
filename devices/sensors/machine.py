"""The machine: board, cores, instruction set, memory, governor, and whether it is emulated."""

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
    """The machine, and notes on what could not be read.

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
        notes.append("memory type unknown: no readable device tree or DMI entry names it")
    board, cores, flags = _board(root), core_groups(root), isa_flags(root)
    if emulated_by := emulator(root, platform.machine(), os.environ):
        core = os.environ.get("QEMU_CPU", "CPU")
        board = f"emulated {core}"
        # The host's cores under the emulated name, without the host's clock.
        cores = (CoreGroup(tuple(cpu for group in cores for cpu in group.cpus), core, None),)
        flags = tuple(sorted(cpu_flags(root) & ISA_FLAGS))
    machine = Machine(
        board=board,
        soc=_soc(root),
        arch=platform.machine(),
        cores=cores,
        isa_flags=flags,
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
    blocks = cpuinfo_blocks(root).values()
    flags = [set((block.get("flags") or block.get("features") or "").split()) for block in blocks]
    return tuple(sorted(ISA_FLAGS.intersection(*flags))) if flags else ()


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
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := read_text(root / path):
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
