"""Files of /proc and /sys: texts, numbers, CPUs, memory, and the cgroups that limit this process.

Everywhere `root` is the folder that holds proc and sys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str | None:
    """A small system file's text without surrounding blanks or NULs; None if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip().strip("\0").strip()
    except OSError:
        return None


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
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / name.strip("/")
        # Inside a container the named folder may not be visible; its own limits are then at the mount's root.
        yield from (folder, *folder.parents[: len(folder.relative_to(base).parts)])


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by name, from lines such as "VmHWM:  1234 kB"."""
    fields = (line.partition(":") for line in (read_text(path) or "").splitlines())
    return {name: int(size.split()[0]) * 1024 for name, _, size in fields if size.endswith(" kB")}
