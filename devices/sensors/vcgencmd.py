"""vcgencmd: the program that asks a Raspberry Pi's firmware."""

from __future__ import annotations

import subprocess


def vcgencmd(command: str) -> str | None:
    """What it prints for a command; None where it is missing or hangs."""
    try:
        return subprocess.run(["vcgencmd", command], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
