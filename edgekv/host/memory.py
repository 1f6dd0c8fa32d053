"""Memory of this machine and process: what is free, what limits it, and giving it back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from edgekv.host.cgroups import cgroup_folders
from edgekv.host.proc import meminfo_nbytes, read_text

SMALL_RAM_NBYTES = 2 * 2**30  # below this the backend takes small micro-batches
NO_LIMIT_NBYTES = 2**60  # cgroup v1 writes the largest multiple of a page where there is no limit
MADV_DONTNEED = 4  # madvise(2)


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without anyone being killed; None where the system does not tell.

    `root` holds proc and sys.
    """
    fields = meminfo_nbytes(root)
    left = [fields["MemAvailable"] + fields.get("SwapFree", 0)] if "MemAvailable" in fields else []
    for folder in cgroup_folders("memory", root):
        limit, used = _limit_and_usage(folder)
        if limit is not None:
            left.append(max(0, limit - used + _cached_nbytes(folder)))
    return min(left, default=None)


def memory_limit_nbytes(root: Path = Path("/")) -> int | None:
    """The tightest limit of this process's cgroups; None without one."""
    limits = [
        limit
        for folder in cgroup_folders("memory", root)
        if (limit := _limit_and_usage(folder)[0]) is not None
    ]
    return min(limits, default=None)


def _limit_and_usage(folder: Path) -> tuple[int | None, int]:
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        text = read_text(folder / limit)
        if text and text.isdigit() and int(text) < NO_LIMIT_NBYTES:
            return int(text), int(read_text(folder / usage) or 0)
    return None, 0


def _cached_nbytes(folder: Path) -> int:
    """Pages of files, which the kernel gives back before it kills."""
    fields = dict(line.split(" ", 1) for line in (read_text(folder / "memory.stat") or "").splitlines())
    both = ("inactive_file", "active_file")
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in both)


def is_small_machine() -> bool:
    """Whether memory is worth more than speed here: below 2 GB of RAM, or of what a container grants."""
    return machine_nbytes() < SMALL_RAM_NBYTES


def machine_nbytes() -> int:
    """RAM of this machine, or what a container grants of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_nbytes() or total)


def release_heap() -> None:
    """Give freed memory back to the system, which glibc would keep for later (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def release_code() -> None:
    """Give back the resident pages of code: of a library's, much is for loading a model only.

    What is used again comes from the system's cache, or the file.
    """
    _release_pages(lambda permissions, path: permissions == "r-xp" and path.startswith("/"))


def release_file(file: Path) -> None:
    """Give back the resident pages of a file that is mapped for reading; they come from it again when they are used."""
    name = str(file.resolve())
    _release_pages(lambda _, path: path == name)


def _release_pages(chosen: Callable[[str, str], bool]) -> None:
    """Give back the mappings whose permissions and path are chosen; nothing may have been written to them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # not Linux
        return
    for line in lines:
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and chosen(permissions, path[0]):
            start, end = (int(number, 16) for number in addresses.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
