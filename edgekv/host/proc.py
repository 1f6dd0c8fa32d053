"""Files of /proc and /sys: texts, numbers, /proc/cpuinfo, /proc/meminfo, a process's peak memory."""

from __future__ import annotations

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
    """Bytes by name in /proc/meminfo (proc_meminfo(5)); empty where there is none. `root` holds proc."""
    fields = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields


def status_nbytes(process: int | str = "self", root: Path = Path("/")) -> dict[str, int]:
    """A process's memory by name in /proc/PID/status, in bytes (proc_pid_status(5)); empty where there is none."""
    lines = (read_text(root / f"proc/{process}/status") or "").splitlines()
    fields = (line.partition(":") for line in lines)
    return {name: int(size.split()[0]) * 1024 for name, _, size in fields if size.endswith(" kB")}


def peak_rss_nbytes(pid: int) -> int | None:
    """Peak resident memory of a process (VmHWM); None where that is not to be had."""
    return status_nbytes(pid).get("VmHWM")
