"""Memory of this machine and process: free bytes, limits of containers, giving pages back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from edgekv.host.proc import cgroup_folders, meminfo_nbytes, read_text, whole_number

SMALL_RAM_NBYTES = 2 * 2**30  # with less, engines save memory at the price of speed
NO_LIMIT_NBYTES = 2**60  # cgroup v1 writes the largest multiple of a page where there is no limit
MADV_DONTNEED = 4  # madvise(2)


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can allocate before the OOM killer acts; None where the system does not say."""
    fields = meminfo_nbytes(root)
    left = [fields["MemAvailable"] + fields.get("SwapFree", 0)] if "MemAvailable" in fields else []
    left += [max(0, limit - used) for limit, used in _cgroup_limits(root)]
    return min(left, default=None)


def memory_limit_nbytes(root: Path = Path("/")) -> int | None:
    """The tightest limit of this process's cgroups; None without one."""
    return min((limit for limit, _ in _cgroup_limits(root)), default=None)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit of each of this process's cgroups that has one, and the bytes of it that are in use."""
    v2 = dict.fromkeys(("memory.max", "memory.high"), "memory.current")  # above high, a process crawls
    names = v2 | {"memory.limit_in_bytes": "memory.usage_in_bytes"}
    for folder in cgroup_folders("memory", root):
        for limit, usage in names.items():
            nbytes = whole_number(read_text(folder / limit))
            if nbytes is not None and nbytes < NO_LIMIT_NBYTES:
                yield nbytes, (whole_number(read_text(folder / usage)) or 0) - _cached_nbytes(folder)


def _cached_nbytes(folder: Path) -> int:
    """Cached pages of files, which the kernel drops before it kills a process."""
    lines = (line.partition(" ") for line in (read_text(folder / "memory.stat") or "").splitlines())
    fields = {name: whole_number(count) or 0 for name, _, count in lines}
    both = ("inactive_file", "active_file")
    return sum(fields.get(f"total_{name}", fields.get(name, 0)) for name in both)


def is_small_machine() -> bool:
    """Whether the machine or container has less than 2 GiB of RAM, so that memory is worth more than speed."""
    return machine_nbytes() < SMALL_RAM_NBYTES


def machine_nbytes() -> int:
    """RAM of this machine, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_nbytes() or total)


def release_heap() -> None:
    """Give freed memory, which glibc would keep for later, back to the system (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def release_code() -> None:
    """Give back the resident pages of code: much of a library's serves only to load a model.

    Pages that are used again are read back from the system's cache, or the file.
    """
    _release_pages(lambda permissions, path: permissions == "r-xp" and path.startswith("/"))


def release_file(file: Path) -> None:
    """Give back the resident pages of a file mapped for reading; a page is read again when it is used."""
    name = str(file.resolve())
    _release_pages(lambda _, path: path == name)


def _release_pages(chosen: Callable[[str, str], bool]) -> None:
    """Give back the mappings whose permissions and path are chosen; nothing may have been written to them."""
    try:
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")[:-1]
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # not Linux
        return
    for line in lines:
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and chosen(permissions, path[0]):
            start, end = (int(number, 16) for number in addresses.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
