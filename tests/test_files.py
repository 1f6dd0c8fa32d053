"""What a killed process leaves is hidden, and gone after the next run; what another one writes stays."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekv.errors import InputError
from edgekv.files import STALE_AFTER_S, atomic_folder, atomic_path, file_sha256, locked

WRITER = """
import sys, time
from pathlib import Path
from edgekv import files
path = Path(sys.argv[2])
context = files.atomic_path(path, True) if sys.argv[1] == "file" else files.atomic_folder(path, True, "marker")
with context as partial:
    (partial if sys.argv[1] == "file" else partial / "marker").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(kind: str, path: Path) -> None:
    if kind == "file":
        with atomic_path(path, True) as partial:
            partial.write_text("whole")
    else:
        with atomic_folder(path, True, "marker") as partial:
            (partial / "marker").write_text("whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_leaves(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITER, kind, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.")
    os.utime(partial, (time.time() - 2 * STALE_AFTER_S,) * 2)
    write(kind, path)
    assert {partial, path} == set(tmp_path.iterdir())  # somebody is writing it still

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    os.utime(partial, (time.time() - 2 * STALE_AFTER_S,) * 2)
    write(kind, path)
    assert list(tmp_path.iterdir()) == [path]
    assert (path if kind == "file" else path / "marker").read_text() == "whole"


def test_sha256_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for i, data in enumerate((b"one", b"two")):
        path.write_bytes(data)
        os.utime(path, ns=(i, i))
        assert file_sha256(path) == file_sha256(path) == hashlib.sha256(data).hexdigest()
    path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        file_sha256(path)


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    with locked(path, wait=False):
        pass
