"""What a killed process leaves is hidden, and gone after the next run; what another one writes stays."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from edgekv.errors import InputError, OutputError
from edgekv.files import (
    STALE_AFTER_S,
    atomic_folder,
    atomic_path,
    file_sha256,
    locked,
    scratch_path,
    temporary_folder,
    unnamed_file,
)

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


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """To the disk that it leads to, whether the target is there or not yet; partial files lie beside the target."""
    far = tmp_path / "far"
    far.mkdir()
    for kind in ("file", "folder"):
        link, target = tmp_path / f"{kind}-link", far / kind
        link.symlink_to(f"far/{kind}")
        for _ in range(2):
            write(kind, link)
            assert link.is_symlink()
            assert (target if kind == "file" else target / "marker").read_text() == "whole"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"far", link.name})
        link.unlink()
    with atomic_path(tmp_path / "again", True) as partial:
        assert partial.parent == tmp_path
    (tmp_path / "again").unlink()
    (tmp_path / "again").symlink_to("far/again")
    with atomic_path(tmp_path / "again", False) as partial, scratch_path(tmp_path / "again") as scratch:
        assert partial.parent == scratch.parent == far


def test_outputs_that_are_no_files_are_refused_and_stay(tmp_path: Path) -> None:
    pipe, loop, astray = tmp_path / "pipe", tmp_path / "loop", tmp_path / "astray"
    os.mkfifo(pipe)
    loop.symlink_to("loop")
    astray.symlink_to("no such/file")
    for path, words in {
        pipe: "is a device, a pipe or a socket; name a file",
        Path("/dev/null"): "is a device, a pipe or a socket; name a file",
        loop: "is a link that leads to itself",
        astray: "no such does not exist; create it first: mkdir -p '.*/no such'$",
        tmp_path / "not there" / "out": "mkdir -p '.*/not there'$",
    }.items():
        for kind in ("file", "folder"):
            with pytest.raises(OutputError, match=words if kind == "file" else None):
                write(kind, path)
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["astray", "loop", "pipe"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_permissions_follow_the_umask_and_stay_when_replaced(kind: str, tmp_path: Path) -> None:
    path, full = tmp_path / "out", 0o666 if kind == "file" else 0o777
    before = os.umask(0o077)
    try:
        for mask in (0o077, 0o027, 0o022):
            os.umask(mask)
            write(kind, path)
            assert stat.S_IMODE(path.stat().st_mode) == full & ~mask
            assert os.umask(mask) == mask
            path.chmod(0o700)
            write(kind, path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            shutil.rmtree(path) if kind == "folder" else path.unlink()
    finally:
        os.umask(before)


def test_without_a_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(OutputError, match=r"temporary files cannot be written: .*; let TMPDIR name"):
        temporary_folder("x").__enter__()
    if sys.platform == "linux":
        handle = unnamed_file("x")
        os.write(handle, b"text")
        os.close(handle)


def test_an_unnamed_file_never_takes_the_number_of_a_standard_stream() -> None:
    code = (
        "import os; from edgekv.files import unnamed_file; [os.close(i) for i in range(3)]; a = unnamed_file('x'); "
        "os._exit(a if a > 2 and not os.get_inheritable(a) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode > 2


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


def test_places_that_no_file_can_be_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {
        "file/out": r"/file is a file, not a folder; choose another name",
        "x" * 300: r"File name too long; choose another place",
        f"{'x' * 300}/out": r"File name too long; choose another place",
    }
    for name, message in places.items():
        with pytest.raises(OutputError, match=message), atomic_path(tmp_path / name, False):
            pass
        with pytest.raises(OutputError, match=message), atomic_folder(tmp_path / name, False, "marker"):
            pass


def test_the_file_behind_standard_output_is_not_replaced(tmp_path: Path) -> None:
    """`edgekv bench -o run.json --force > run.json`, or -o /dev/stdout: either text would be lost."""
    code = "import sys; from edgekv.files import *; check_output(Path(sys.argv[1]), True)"
    for name in (str(tmp_path / "out"), "/dev/stdout"):
        with (tmp_path / "out").open("w") as out:
            run = subprocess.run([sys.executable, "-c", code, name], stdout=out, stderr=subprocess.PIPE)
        assert b"is the file that standard output or error goes to" in run.stderr
