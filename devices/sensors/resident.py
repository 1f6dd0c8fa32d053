"""Resident memory of a process, and which part of it the mapped model file holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edgekv.devices.reporting.report import Memory
from edgekv.host.proc import status_nbytes


@dataclass(frozen=True)
class ResidentSet:
    """Bytes in RAM."""

    rss_nbytes: int
    peak_rss_nbytes: int
    file_nbytes: int  # of `rss`: pages of one mapped file

    @classmethod
    def of_self(cls, mapped_file: Path, root: Path = Path("/")) -> ResidentSet:
        """This process, from /proc/self (proc_pid_status(5), proc_pid_smaps(5)); elsewhere psutil.

        Raises:
            OSError: the system shows no memory figures at all.
        """
        sizes = status_nbytes("self", root)
        if not sizes:
            import psutil

            info = psutil.Process().memory_info()
            return cls(info.rss, getattr(info, "peak_wset", info.rss), 0)
        smaps = os.fsdecode((root / "proc/self/smaps").read_bytes())
        return cls(sizes["VmRSS"], sizes["VmHWM"], mapped_resident_nbytes(smaps, mapped_file.resolve()))


def mapped_resident_nbytes(smaps: str, mapped_file: Path) -> int:
    """Sum of Rss over the mappings of one file in the text of a /proc/PID/smaps."""
    total, inside = 0, False
    for line in smaps.split("\n"):
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):  # a mapping's header: range, permissions, offset, device, inode, path
            parts = line.split(maxsplit=5)
            inside = len(parts) == 6 and parts[5] == str(mapped_file)
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def split_memory(
    loaded: dict[str, int], ended: dict[str, int], cache: int, repacked: int, card: int | None = None
) -> Memory:
    """Split the peak: `loaded` and `ended` are a worker's `memory` answers after loading and at the end.

    The engine fills its cache with zeros when it makes it and maps the weights with all pages present, so
    both are resident at `loaded`; what running adds after that is its compute buffers. With `card` bytes on
    a GPU, cache and repacked weights are there and not in the resident set.
    """
    weights = ended["file"] + repacked
    compute = max(0, ended["rss"] - loaded["rss"])
    held = ended["file"] + compute if card else weights + cache + compute
    return Memory(ended["peak"], weights, cache, compute, ended["peak"] - held, card)
