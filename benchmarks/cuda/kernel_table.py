"""A decoded token's kernels, from the tables of kernel_times.c: python kernel_table.py FOLDER [LAYERS]

Of the tables in FOLDER the one in which the card was busiest, without a prefill in it. Tokens are counted by the
attention kernel, which runs once a layer (16 in Llama-3.2-1B's shape).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One kernel within the window."""

    name: str
    launches: int
    ns: int


@dataclass(frozen=True)
class Table:
    """One window of time on the card."""

    window_ns: int
    busy_ns: int
    kernels: tuple[Kernel, ...]

    @classmethod
    def read(cls, path: Path) -> Table:
        """A table as kernel_times.c writes it."""
        first, second, *rows = path.read_text().splitlines()
        kernels = (row.split("\t") for row in rows)
        return cls(
            int(first.split("\t")[1]),
            int(second.split("\t")[1]),
            tuple(Kernel(name, int(launches), int(ns)) for launches, ns, name in kernels),
        )

    @property
    def decodes_only(self) -> bool:
        """Whether it holds attention, and no matrix product of more than one token."""
        return any("flash_attn_ext" in k.name for k in self.kernels) and not any(
            "mul_mat_q" in k.name for k in self.kernels
        )


def main() -> None:
    folder, layers = Path(sys.argv[1]), int((*sys.argv, "16")[2])
    tables = [table for path in sorted(folder.glob("*.tsv")) if (table := Table.read(path)).decodes_only]
    if not tables:
        sys.exit(f"{folder}: no table of decoding alone; decode more tokens")
    table = max(tables, key=lambda t: t.busy_ns / t.window_ns)
    tokens = max(k.launches for k in table.kernels if "flash_attn_ext" in k.name) / layers
    launches = sum(k.launches for k in table.kernels) / tokens
    print(
        f"{tokens:.1f} tokens; of a token's {table.window_ns / tokens / 1e6:.2f} ms a kernel ran in "
        f"{table.busy_ns / tokens / 1e6:.2f}; {launches:.0f} kernels"
    )
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(k.name for k in table.kernels),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for kernel, name in zip(table.kernels, names, strict=True):
        print(f"{kernel.ns / tokens / 1e3:8.1f} us {kernel.launches / tokens:6.1f} launches  {name[:110]}")


if __name__ == "__main__":
    main()
