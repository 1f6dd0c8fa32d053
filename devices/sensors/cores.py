"""Cores of the CPU by kind, the fastest first.

On Linux from sysfs (Documentation/admin-guide/cputopology.rst, cpu_capacity of arm64's topology.c); elsewhere
only their number is known.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgekv.devices.reporting.report import CoreGroup
from edgekv.host.proc import cpuinfo_blocks, read_number, read_text
from edgekv.host.threads import parse_cpu_list

# CPU part numbers of /proc/cpuinfo for implementer 0x41 (Arm); from util-linux sys-utils/lscpu-arm.c.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
    "0xd85": "Cortex-X925",
    "0xd87": "Cortex-A725",
}


def core_groups(root: Path = Path("/")) -> tuple[CoreGroup, ...]:
    """The online cores by kind, the fastest kind first. `root` holds proc and sys."""
    blocks = cpuinfo_blocks(root)
    online = parse_cpu_list(read_text(root / "sys/devices/system/cpu/online") or "")
    cpus = [cpu for cpu in online if not blocks or cpu in blocks] or list(range(os.cpu_count() or 1))
    efficient = set(parse_cpu_list(read_text(root / "sys/devices/cpu_atom/cpus") or ""))  # Intel hybrid
    by_kind: dict[tuple[float, float | None, str], list[int]] = {}
    for cpu in cpus:
        name = _core_name(blocks.get(cpu, {})) + (" (E core)" if cpu in efficient else "")
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        khz = read_number(folder / "cpufreq/cpuinfo_max_freq")
        mhz = khz / 1000 if khz else None
        speed = read_number(folder / "cpu_capacity") or mhz or 0.0
        by_kind.setdefault((speed, mhz, name), []).append(cpu)
    ranked = sorted(by_kind.items(), key=lambda item: (-item[0][0], item[1][0]))
    return tuple(CoreGroup(tuple(ids), name, mhz) for (_, mhz, name), ids in ranked)


def _core_name(block: dict[str, str]) -> str:
    if "cpu part" in block:
        part = block["cpu part"].lower()
        if block.get("cpu implementer", "").lower() == "0x41":
            return ARM_PARTS.get(part, f"Arm part {part}")
        return f"implementer {block.get('cpu implementer', '?')} part {part}"
    return block.get("model name", "unknown")
