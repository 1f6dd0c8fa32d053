"""kill -9 at any moment: nothing half-written under its final name, nothing that stays, and the next run works.

Each command is killed when it begins to write. `make fuzz` sets EDGEKV_KILLS: so many more, at random moments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from edgekv.errors import EdgeKVError
from edgekv.files import STALE_AFTER_S
from edgekv.heal.weights import read_healed
from edgekv.models.onnx.manifest import check_folder
from edgekv.models.open import open_model

KILLS = int(os.environ.get("EDGEKV_KILLS", "0"))
WORDS = ("sea", "wide", "cat", "sat", "under", "old", "table", "said", "ann", "nobody", "at", "all")


@dataclass(frozen=True)
class Case:
    """A command, its output's name, and what fails unless the output is sound."""

    arguments: str  # {model} and {text} stand for files, -o is added
    output: str
    sound: Callable[[Path], object]
    again: str = "--force"


def _load_all(path: Path) -> None:
    source = open_model(path)
    for name in source.names():
        source.load(name)


CASES = {
    "convert": Case("convert {model} --target 0.5 --text {text} --text-tokens 1024", "out.gguf", _load_all),
    "quantize": Case(
        "quantize {model} --weights q4_0 --text {text} --text-tokens 512 -t 1", "out.gguf", _load_all
    ),
    "export gguf": Case("export gguf {model} --weights f16", "out.gguf", _load_all),
    "export onnx": Case("export onnx {model} --weights f32", "out", check_folder),
    "heal": Case(
        "heal {model} --target 0.5 --text {text} --steps 6 --batch-tokens 256 --seq-len 64 --eval-windows 2 "
        "--device cpu",
        "out.safetensors",
        read_healed,
        "--resume",
    ),
}


class Place:
    """A folder for the output, one for temporary files, and one for caches."""

    def __init__(self, root: Path, case: Case, model: Path) -> None:
        self._case, self._model = case, model
        self.folder, self.temporary, self._cache = (root / name for name in ("out", "tmp", "cache"))
        for folder in (self.folder, self.temporary, self._cache):
            folder.mkdir(parents=True)
        self.output = self.folder / case.output
        self._text = root / "text.txt"
        rng = random.Random(1)
        self._text.write_text(" ".join(rng.choice(WORDS) for _ in range(6000)))

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """The command, running."""
        words = self._case.arguments.format(model=self._model, text=self._text).split()
        return subprocess.Popen(
            [sys.executable, "-m", "edgekv", *words, "-o", str(self.output), *more],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ
            | {"TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(self._cache), "OMP_NUM_THREADS": "1"}
            | {"TORCHINDUCTOR_CACHE_DIR": str(self._cache / "torch")},
        )

    def run(self, *more: str) -> float:
        """The command, to its end; its seconds."""
        began = time.monotonic()
        process = self.start(*more)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        self._case.sound(self.output)
        return time.monotonic() - began

    def unfinished(self) -> list[Path]:
        """What is there besides whole outputs."""
        found = [path for path in self.folder.iterdir() if path != self.output]
        return [*found, *self.temporary.iterdir(), *self._cache.rglob(".*.partial")]

    def is_sound(self) -> bool:
        """Whether the output is there and whole; half an output fails."""
        if not self.output.exists():
            return False
        self._case.sound(self.output)
        return True

    def contents(self) -> dict[str, str]:
        """SHA-256 of the output's files."""
        files = [self.output] if self.output.is_file() else sorted(self.output.iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(process: subprocess.Popen[bytes], after: Iterator[None]) -> None:
    """kill -9 once `after` ends; children of its must not go on without it."""
    for _ in after:
        if process.poll() is not None:
            break
        time.sleep(0.002)
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def until(moment: float) -> Iterator[None]:
    end = time.monotonic() + moment
    while time.monotonic() < end:
        yield


def check_next_run(place: Place, case: Case) -> None:
    """After a kill: what is left is hidden, and the next run works and leaves its output alone."""
    there = place.is_sound()
    state = place.output.with_name(f"{place.output.name}.state")
    for path in place.unfinished():
        hidden = path.name.startswith(".") or path.parent == place.temporary
        assert hidden or path == state, path
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() - 2 * STALE_AFTER_S,) * 2)
    more = [case.again] if there or state.exists() else []
    if case.again == "--resume" and there and not state.exists():
        more = ["--force"]
    place.run(*more)
    assert place.unfinished() == []


@pytest.mark.parametrize("name", CASES)
def test_killed_while_it_writes(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, CASES[name], tiny_llama)

    def writes() -> Iterator[None]:
        while not [path for path in place.unfinished() if path.exists() and path.name.startswith(".")]:
            yield

    kill(place.start(), writes())
    check_next_run(place, CASES[name])


@pytest.mark.skipif(not KILLS, reason="make fuzz runs it: minutes")
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    case, rng = CASES[name], random.Random(name)
    whole = Place(tmp_path / "whole", case, tiny_llama)
    seconds = whole.run()
    for number in range(-(-KILLS // len(CASES))):
        place = Place(tmp_path / str(number), case, tiny_llama)
        older = number % 2 and case.again == "--force"
        if older:
            place.run()
        before = place.contents() if older else None
        kill(place.start(*([case.again] if older else [])), until(rng.uniform(0.1, 1.05) * seconds))
        if before is not None:
            assert place.is_sound(), "neither the older output nor the new one is there"
        check_next_run(place, case)


def test_a_damaged_output_is_told(tmp_path: Path, tiny_llama: Path) -> None:
    """The tests above can fail: half a file is not sound."""
    path = tmp_path / "half.gguf"
    path.write_bytes(tiny_llama.read_bytes()[: tiny_llama.stat().st_size // 2])
    with pytest.raises(EdgeKVError):
        _load_all(path)
