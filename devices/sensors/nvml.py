"""What NVIDIA's management library tells of the card that a program uses (nvml.h), through ctypes."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any


class _MemoryInfo(ctypes.Structure):
    """nvmlMemory_t, bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True)
class Card:
    """One card now. `used_nbytes` is of all programs: what one takes is the difference that it makes."""

    name: str
    total_nbytes: int
    used_nbytes: int


def library() -> Any | None:
    """The library, initialized; None where there is no NVIDIA driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


def handles(nvml: Any) -> list[ctypes.c_void_p]:
    """The cards, in the driver's order."""
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = []
    for i in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) == 0:
            found.append(device)
    return found


def first_card() -> Card | None:
    """The first card that CUDA programs of this environment see (CUDA_VISIBLE_DEVICES), or None."""
    nvml = library()
    if nvml is None:
        return None
    cards = handles(nvml)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    index = int(first) if first.isdigit() else 0
    if index >= len(cards):
        return None
    name, memory = ctypes.create_string_buffer(96), _MemoryInfo()
    if nvml.nvmlDeviceGetName(cards[index], name, len(name)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(cards[index], ctypes.byref(memory)) != 0:
        return None
    return Card(name.value.decode(), memory.total, memory.used)
