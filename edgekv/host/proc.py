"""Files of /proc and /sys: texts, numbers, CPUs, memory, and the cgroups that limit this process.

Everywhere `root` is the folder that holds proc and sys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str | None:
    """A small system file's text without surrounding blanks or NULs; None if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip().strip("\0").strip()
    except (OSError, ValueError):  # ValueError: a zero byte in the path, which another system file gave
        return None


def whole_number(text: str | None) -> int | None:
    """A count that a system file holds; None for "max", -1 and whatever else is no count."""
    return int(text) if text and text.isdecimal() else None


def read_number(path: Path) -> float | None:
    """A number that a system file holds; None if there is none."""
    try:
        return float(read_text(path) or "")
    except ValueError:
        return None


def cpuinfo_blocks(root: Path) -> dict[int, dict[str, str]]:
    """/proc/cpuinfo by CPU number; keys in lower case."""
    blocks: dict[int, dict[str, str]] = {}
    for text in (read_text(root / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        block = {key.strip().lower(): value.strip() for key, value in pairs}
        if block.get("processor", "").isdigit():
            blocks[int(block["processor"])] = block
    return blocks


def meminfo_nbytes(root: Path = Path("/")) -> dict[str, int]:
    """Bytes by name in /proc/meminfo (proc_meminfo(5)); empty where there is none."""
    return _sizes(root / "proc/meminfo")


def status_nbytes(process: int | str = "self", root: Path = Path("/")) -> dict[str, int]:
    """Bytes by name in /proc/PID/status of a process (proc_pid_status(5)); empty where there is none."""
    return _sizes(root / f"proc/{process}/status")


def peak_rss_nbytes(pid: int) -> int | None:
    """Peak resident memory of a process (VmHWM); None on systems without /proc."""
    return status_nbytes(pid).get("VmHWM")


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's cgroup and its ancestors that may limit "cpu" or "memory"; every limit counts.

    Kernel documentation: admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, colon, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not colon or (controllers and controller not in controllers.split(",")):
            continue
        for base in _cgroup_mounts(controller if controllers else "", root):
            folder = base / name.strip("/")
            # Inside a container the named folder may not be visible; its own limits are then at the mount's root.
            yield from (folder, *folder.parents[: len(folder.relative_to(base).parts)])


def _cgroup_mounts(controller: str, root: Path) -> list[Path]:
    """Where a version 1 controller, or with "" version 2, is mounted: as mountinfo or else the usual folder says.

    Version 1 mounts several controllers at one place, such as cpu,cpuacct; links with the single names are only a
    custom. proc_pid_mountinfo(5): field 5 is the place, blanks in octal; type and options follow a dash.
    """
    found = []
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        match line.partition(" - ")[0].split(), line.partition(" - ")[2].split():
            case [_, _, _, _, place, *_], [kind, _, options] if (
                controller in options.split(",") if controller else kind == "cgroup2"
            ) and kind.startswith("cgroup"):
                place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place)
                found.append(root / place.lstrip("/"))
    base = root / "sys/fs/cgroup"
    if found or not controller:
        return found or [base]
    return [folder for folder in sorted(base.glob("*")) if controller in folder.name.split(",")]


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by name, from lines such as "VmHWM:  1234 kB"."""
    fields = (line.partition(":") for line in (read_text(path) or "").splitlines())
    counts = (
        (name, whole_number(size.removesuffix(" kB").strip())) for name, _, size in fields if " kB" in size
    )
    return {name: count * 1024 for name, count in counts if count is not None}
