"""Where Linux keeps the limits of the container that this process runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgekv.host.proc import read_text


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's cgroup and its ancestors that may limit "cpu" or "memory": every one's counts.

    `root` holds proc and sys. Kernel documentation: admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and
    scheduler/sched-bwc.rst.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, entry = line.partition(":")
        controllers, _, name = entry.partition(":")
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / name.strip("/")
        # Inside a container the named folder may not be visible; its own limits are then at the mount's root.
        yield from (folder, *folder.parents[: len(folder.relative_to(base).parts)])
