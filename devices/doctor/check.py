"""Check: one finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Check:
    """One finding; `advice` says what to do, empty if nothing."""

    name: str
    status: Status
    found: str
    advice: str = ""
