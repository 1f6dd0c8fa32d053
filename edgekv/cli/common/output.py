"""What every command prints alike."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """The command as it was typed, but for quotes that were not needed."""
    return "edgekv " + shlex.join(sys.argv[1:])
