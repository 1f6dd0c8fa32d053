"""NVIDIA cards: memory, energy and power from the driver's management library (NVML), with nvidia-ml-py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Reader = Callable[[], float | None]


@dataclass(frozen=True)
class Card:
    """One card now. `used_nbytes` is the sum over all programs: one's own share is the difference it makes."""

    name: str
    total_nbytes: int
    used_nbytes: int


def ask(function: str, *arguments: Any) -> Any:
    """The value of an NVML function; None without its package or a driver, or where the card does not support it."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()  # counts its callers: from the second on it costs nothing
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError:
        return None


def missing_package(root: Path = Path("/")) -> tuple[str, ...]:
    """A note if a driver is loaded but its package is missing."""
    if find_spec("pynvml") or not (root / "proc/driver/nvidia/version").exists():
        return ()
    return ("memory and energy of the NVIDIA card unknown: pip install 'edgekv[nvidia]'",)


def first_card() -> Card | None:
    """The first card that CUDA programs of this environment see (CUDA_VISIBLE_DEVICES), or None."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    card = ask("nvmlDeviceGetHandleByIndex", int(first) if first.isdigit() else 0)
    name, memory = ask("nvmlDeviceGetName", card), ask("nvmlDeviceGetMemoryInfo", card)
    return Card(name, memory.total, memory.used) if name and memory else None


def power_readers() -> Iterator[tuple[Reader, Reader]]:
    """Per card, in the driver's order: readers of its energy so far in joules, and of its power in watts."""
    for i in range(ask("nvmlDeviceGetCount") or 0):
        card = ask("nvmlDeviceGetHandleByIndex", i)
        yield (
            _thousandths("nvmlDeviceGetTotalEnergyConsumption", card),
            _thousandths("nvmlDeviceGetPowerUsage", card),
        )


def _thousandths(function: str, card: Any) -> Reader:
    def read() -> float | None:
        value = ask(function, card)
        return None if value is None else value / 1000

    return read
