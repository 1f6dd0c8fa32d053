"""Whether a model fits the memory that is left, asked before it is loaded: later only the kernel could say no.

llama.cpp fills its cache with zeros when it makes it, so a cache that does not fit ends in the OOM killer, which
may choose another program. Linux tells what is left in /proc/meminfo, a container's limit in its cgroup.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from edgekv.backends.cgroups import cgroup_folders, read_text
from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.footprint import CELLS, SMALL_RAM_NBYTES, footprint
from edgekv.gguf_layout import GGUFHeader
from edgekv.gguf_spec import spec_from_gguf
from edgekv.spec import ModelSpec

MIB = 2**20
NO_LIMIT_NBYTES = 2**60  # cgroup v1 writes the largest multiple of a page where there is no limit
MADV_DONTNEED = 4  # madvise(2)
NARROWER = ("q8_0", "q4_0")


def require_memory(
    path: Path, header: GGUFHeader, n_ctx: int, cache_type: str, n_ubatch: int, root: Path = Path("/")
) -> int | None:
    """Make sure that weights, cache and buffers fit; the bytes left beside them, None if that cannot be known.

    `root` holds proc and sys.

    Raises:
        InputError: they do not; says what would.
    """
    left = available_nbytes(root)
    shapes = {tensor.name: tensor.dims[::-1] for tensor in header.tensors}
    try:
        spec = spec_from_gguf(header.metadata, shapes, path)
    except (
        ModelFileError,
        UnsupportedError,
    ):  # llama.cpp runs more than EdgeKV knows, and refuses in its words
        return None
    weights = sum(tensor.nbytes for tensor in header.tensors)
    needed = _needed_nbytes(spec, weights, n_ctx, cache_type, n_ubatch)
    if left is None or needed is None:
        return None
    if needed <= left:
        return left - needed
    cache = spec.kv_bytes_per_token(cache_type) * n_ctx
    raise InputError(
        f"{path} with {n_ctx} tokens of {cache_type} cache needs about {needed / MIB:,.0f} MiB ({weights / MIB:,.0f} "
        f"of weights, {cache / MIB:,.0f} of cache) and {left / MIB:,.0f} MiB are left; "
        + _remedy(spec, weights, n_ctx, cache_type, n_ubatch, left)
    )


def _needed_nbytes(spec: ModelSpec, weights: int, n_ctx: int, cache_type: str, n_ubatch: int) -> int | None:
    """What loading adds to this process; None for a cache type that the model cannot have."""
    try:
        return footprint(spec, weights, cache_type, n_ctx, n_ubatch, runtime_nbytes=0).needed_nbytes
    except ValueError:
        return None


def _remedy(spec: ModelSpec, weights: int, n_ctx: int, cache_type: str, n_ubatch: int, left: int) -> str:
    remedies = []
    blocks, too_many = 0, -(-n_ctx // CELLS)
    while too_many - blocks > 1:  # the need grows with the context, so halving finds the edge
        middle = (blocks + too_many) // 2
        needed = _needed_nbytes(spec, weights, middle * CELLS, cache_type, n_ubatch)
        blocks, too_many = (middle, too_many) if needed is not None and needed <= left else (blocks, middle)
    if blocks:
        remedies.append(f"--ctx-size {blocks * CELLS}")
    now = spec.kv_bytes_per_token(cache_type)
    for narrower in NARROWER:
        needed = _needed_nbytes(spec, weights, n_ctx, narrower, n_ubatch)
        if needed is not None and needed <= left and spec.kv_bytes_per_token(narrower) < now:
            remedies.append(f"--cache-type {narrower}")
            break
    if not remedies:
        return "take a smaller model, end other programs, or add swap"
    return f"{' or '.join(remedies)} would fit, or end other programs"


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without anyone being killed; None where the system does not tell.

    `root` holds proc and sys.
    """
    fields = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
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
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_nbytes() or total) < SMALL_RAM_NBYTES


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
