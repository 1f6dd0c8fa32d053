"""A few mutated files for every reader of files that somebody else wrote; `make fuzz` has 2,000 of each kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

COUNT = 25


def test_readers_take_a_file_or_say_what_is_wrong_with_it() -> None:
    """Nothing but EdgeKVError, no dead process, no file written, bounds on time and memory."""
    script = Path(__file__).parent / "run.py"
    result = subprocess.run([sys.executable, str(script), str(COUNT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"{COUNT} mutations of each of \d\d kinds, 0 went wrong", result.stdout)
