"""Threads for an engine: one per physical big core that this process may run on.

More threads than big cores slow decoding down: every matrix product waits for the slowest thread, which then
runs on a little core (Phi-3-mini on an Orange Pi 5: 3.8 tokens/s on all 8 cores, 6.9 on the 4 big ones).
Linux lists the kinds of cores in sysfs, and the limits of a container in its cgroup.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from edgekv.host.proc import cgroup_folders, read_number, read_text, whole_number

# A core counts as big from this share of the fastest one's speed: so do the middle cores of three-tier chips
# and cores without the highest turbo, but not an A55 beside an A76 (0.5).
BIG_CORE_SHARE = 0.75


def default_threads(root: Path = Path("/")) -> int:
    """Threads for this process: big physical cores, within affinity and CPU quota; at least 1."""
    count, quota = len(big_cores(set(allowed_cpus()), root)), cpu_quota(root)
    return max(1, count if quota is None else min(count, int(quota)))


def big_cores(allowed: set[int], root: Path = Path("/")) -> list[int]:
    """One CPU number per physical big core among `allowed`."""
    cpus = root / "sys/devices/system/cpu"
    # Intel's hybrid CPUs list their E cores
    efficient = _listed(root / "sys/devices/cpu_atom/cpus")
    allowed = allowed - efficient or allowed
    speed = {cpu: _speed(cpus / f"cpu{cpu}") for cpu in allowed}
    fastest = max(speed.values(), default=0.0)
    seen: set[int] = set()
    chosen = []
    for cpu in sorted(allowed):
        if speed[cpu] < BIG_CORE_SHARE * fastest or cpu in seen:
            continue
        chosen.append(cpu)
        seen |= _listed(cpus / f"cpu{cpu}/topology/thread_siblings_list")
    return chosen


def _listed(path: Path) -> set[int]:
    """The CPUs that a system file lists; none where it cannot be read or is no such list."""
    try:
        return set(parse_cpu_list(read_text(path) or ""))
    except ValueError:
        return set()


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the cgroups of this process allow; None without a limit."""
    quotas = (_quota_of(folder) for folder in cgroup_folders("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path) -> float | None:
    """CPU seconds per second of one cgroup, from cpu.max ("200000 100000") or version 1's pair of files."""
    text = read_text(folder / "cpu.max") or " ".join(
        read_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")
    )
    quota, _, period = text.partition(" ")
    micros, each = whole_number(quota), whole_number(period or "100000")
    return micros / each if micros is not None and each else None


def allowed_cpus() -> tuple[int, ...]:
    """CPUs that this process may run on: a container or taskset can forbid some."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers of a list such as "0-3,6"; ValueError if it is malformed."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        if not (match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"{text!r} is not a CPU list such as 0-3,6")
        first = int(match[1])
        cpus |= set(range(first, int(match[2] or first) + 1))
    return tuple(sorted(cpus))


def _speed(folder: Path) -> float:
    """A core's relative speed; 0 where the machine does not say, so that all its cores are equal."""
    return read_number(folder / "cpu_capacity") or read_number(folder / "cpufreq/cpuinfo_max_freq") or 0.0
