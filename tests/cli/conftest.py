"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EDGEKV = str(Path(sys.executable).parent / "edgekv")
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def edgekv() -> Callable[..., Result]:
    """Runs `edgekv` with arguments, one thread, and no input."""

    def run(*args: object, **options: object) -> Result:
        return subprocess.run(
            [EDGEKV, *map(str, args)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            **options,  # type: ignore[call-overload]
        )

    return run


@pytest.fixture(scope="session")
def refused(edgekv: Callable[..., Result]) -> Callable[..., str]:
    """Runs a command that must end as bad input does: exit code 2, one line with a remedy, nothing printed."""

    def run(*args: object, **options: object) -> str:
        result = edgekv(*args, **options)
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("edgekv: error: ")
        assert ";" in lines[0] or "either" in lines[0], f"no remedy: {lines[0]}"
        return lines[0]

    return run
