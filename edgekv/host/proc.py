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


def peak_rss_nbytes(pid: int) -> int | None:
    """Peak resident memory of a process (VmHWM of proc_pid_status(5)); None where that is not to be had."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None
