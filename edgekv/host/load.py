"""Who else uses this machine's CPUs: shares of CPU time over a while, from /proc (proc_stat(5), proc_pid_stat(5)).

llama.cpp's threads wait for each other at every step of a graph, so that other work on one of their cores slows all of
them down by more than its share: with it, a measured speed says little about model or cache.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edgekv.host.proc import read_text, whole_number
from edgekv.host.threads import allowed_cpus

BUSY_SHARE = 0.1  # of CPU time, from which the machine counts as not its own
LEAST_S = 0.3  # the kernel counts in hundredths of a second: less says nothing


@dataclass(frozen=True)
class Load:
    """CPU time that was not this program's, as shares of what its CPUs had."""

    others: float  # other programs
    stolen: float  # other machines on the same host
    n_cpus: int

    @property
    def busy(self) -> bool:
        """Whether the machine was not this program's own."""
        return self.others + self.stolen >= BUSY_SHARE

    def words(self) -> str:
        """What others took."""
        told = [f"other programs took {self.others:.0%}"] if self.others >= 0.005 or not self.stolen else []
        told += [f"the host took {self.stolen:.0%}"] if self.stolen >= 0.005 else []
        return f"{' and '.join(told)} of the time of {self.n_cpus} CPUs"


@dataclass(frozen=True)
class _Ticks:
    """Counters of the CPUs, and those of this program's processes."""

    total: int
    used: int
    stolen: int
    own: dict[int, int]


class LoadMeter:
    """The load since it was made.

    Args:
        pids: processes of this program besides this one and those that it has waited for.
        cpus: those that the program runs on; by default all that it may.
    """

    def __init__(
        self, pids: Collection[int] = (), cpus: Collection[int] = (), root: Path = Path("/")
    ) -> None:
        self._pids, self._cpus, self._root = {os.getpid(), *pids}, tuple(cpus) or allowed_cpus(), root
        self._started, self._first = time.monotonic(), self._read()

    def read(self) -> Load | None:
        """The load so far; None where the system does not tell, or after less than LEAST_S."""
        if time.monotonic() - self._started < LEAST_S:
            return None
        first, now = self._first, self._read()
        total = now.total - first.total
        if total <= 0:
            return None
        own = sum(ticks - first.own.get(pid, 0) for pid, ticks in now.own.items())
        others = max(0, now.used - first.used - own)
        return Load(others / total, max(0, now.stolen - first.stolen) / total, len(self._cpus))

    def _read(self) -> _Ticks:
        total = used = stolen = 0
        for line in (read_text(self._root / "proc/stat") or "").splitlines():
            name, *counts = line.split()
            if not (name.startswith("cpu") and whole_number(name[3:]) in self._cpus):
                continue
            user, nice, system, idle, iowait, irq, softirq, steal = (
                whole_number(count) or 0 for count in [*counts, *"0" * 8][:8]
            )
            busy = user + nice + system + irq + softirq
            total, used, stolen = total + busy + idle + iowait + steal, used + busy, stolen + steal
        own = {pid: self._process(pid) for pid in self._pids}
        return _Ticks(total, used, stolen, {pid: ticks for pid, ticks in own.items() if ticks is not None})

    def _process(self, pid: int) -> int | None:
        """Ticks of a process and of its children that it has waited for; None once it is gone."""
        fields = (read_text(self._root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
        return sum(whole_number(field) or 0 for field in fields[11:15]) if len(fields) > 14 else None


def load_now(seconds: float = 0.5) -> Load | None:
    """The load over a short while in which this program does nothing."""
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.read()


def waiting_share(root: Path = Path("/")) -> float | None:
    """Share of the last ten seconds in which a task waited for a CPU: Documentation/accounting/psi.rst."""
    found = re.search(r"^some avg10=(\d+\.\d+)", read_text(root / "proc/pressure/cpu") or "")
    return float(found[1]) / 100 if found else None
