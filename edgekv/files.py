"""Files written so that nothing is ever half-written, locked against other processes, and their SHA-256."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgekv.errors import InputError, OutputError

STALE_AFTER_S = 60  # a younger file may be about to be locked
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # renameat2(2)


def check_output(path: Path, force: bool) -> None:
    """Refuse, before any work is done, an output that could not be written at its end.

    Raises:
        OutputError: the folder is missing, or `path` is a folder or a device, or exists without `force`.
    """
    try:
        _check_output(path, force)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _check_output(path: Path, force: bool) -> None:
    _require_parent(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device, a pipe or a socket; name a file to write")
    if _is_open_as_stream(path):
        raise OutputError(f"{path} is the file that standard output or error goes to; name another")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; pass --force to replace it, or choose another name")


def _is_open_as_stream(path: Path) -> bool:
    """Whether a file is behind standard output or error, whose lines would be lost once it is replaced."""
    with contextlib.suppress(OSError):
        return any(os.path.samestat(path.stat(), os.fstat(stream)) for stream in (1, 2))
    return False


def _target(path: Path) -> Path:
    """Where a path leads: links are written through, and what is not there yet may still be made.

    Raises:
        OutputError: a link leads to itself.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads to itself; remove it, or choose another name")
    return target


def _require_parent(path: Path) -> None:
    folder = (_target(path) if path.is_symlink() else path).parent
    if folder.is_file():
        raise OutputError(f"{folder} is a file, not a folder; choose another name than {path}")
    if not folder.is_dir():
        raise OutputError(
            f"the folder {folder} does not exist; create it first: mkdir -p {shlex.quote(str(folder))}"
        )


def _mode(path: Path, new: int) -> int:
    """Permissions that a file or folder keeps when it is replaced, or gets as a new one under the umask."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0o077)
    os.umask(umask)
    return new & ~umask


@contextlib.contextmanager
def atomic_path(path: Path, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when not.

    A process killed in the block leaves at most a hidden `.<name>.*.partial`, never a half-written `path`;
    the next one that writes `path` removes it. Where `path` is a link, all this holds for the file that it leads to.

    Raises:
        OutputError: the folder is missing or not writable, `path` exists without `force`, the disk is full.
    """
    check_output(path, force)
    target = _target(path)
    with scratch_path(path) as partial:
        yield partial
        os.chmod(partial, _mode(target, 0o666))
        os.replace(partial, target)


@contextlib.contextmanager
def scratch_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, removed when the block ends, or after a kill by the next for `path`.

    Raises:
        OutputError: the folder is not writable, the disk is full.
    """
    target = _target(path)
    _sweep(target)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write in {target.parent}: {error.strerror}; choose another folder"
        ) from error
    os.close(handle)
    partial = Path(name)
    try:
        with locked(partial):
            yield partial
    except OSError as error:
        raise OutputError(
            f"writing {path} failed: {error.strerror or error}; nothing was left behind, free some space and try again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Lock a file or folder until the block ends, or this process does, however that comes.

    Raises:
        BlockingIOError: somebody has the lock, and `wait` is off.
        OSError: it is gone.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of `path`."""
    _remove_stale(path.absolute().parent.glob(f".{glob.escape(path.name)}.*.partial"))


def _remove_stale(paths: Iterable[Path]) -> None:
    """Remove this user's files and folders among these that are a minute old and that nobody has locked."""
    for stale in paths:
        with contextlib.suppress(OSError), locked(stale, wait=False):
            found = stale.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime <= STALE_AFTER_S:
                continue
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()


@contextlib.contextmanager
def atomic_folder(folder: Path, force: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed onto it when the block ends well and removed when not.

    What a killed process leaves is hidden, and removed by the next one that writes `folder`. With `force` an
    existing folder is replaced, if it is empty or holds the file `marker`: nobody else's folder is ever deleted.

    Raises:
        OutputError: the parent is missing or not writable, `folder` exists without `force` or is not of this
            kind, the disk is full.
    """
    try:
        check_output_folder(folder, force, marker)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; choose another place") from error
    folder = _target(folder)
    _sweep(folder)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write in {folder.parent}: {error.strerror}; choose another folder"
        ) from error
    try:
        with locked(partial):
            yield partial
        os.chmod(partial, _mode(folder, 0o777))
        if folder.exists():
            if not _exchange(partial, folder):
                old = partial.with_name(f"{partial.name.removesuffix('.partial')}.old.partial")
                os.replace(folder, old)
                os.replace(partial, folder)
                shutil.rmtree(old)
        else:
            os.replace(partial, folder)
    except OSError as error:
        raise OutputError(
            f"writing {folder} failed: {error.strerror or error}; nothing was left behind, free some space and "
            "try again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap what two paths name, in one step: renameat2(2). False where the system or its file system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def check_output_folder(folder: Path, force: bool, marker: str) -> None:
    """Refuse, before any work is done, a folder that `atomic_folder` would refuse; raises as it does."""
    _require_parent(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder to write")
    if not force:
        raise OutputError(f"{folder} exists; pass --force to replace it, or choose another name")
    if not (folder / marker).is_file() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds something else than an export; choose another folder")


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder for temporary files, removed with all that is in it when the block ends, or after a kill by the next.

    Raises:
        OutputError: there is no place for it.
    """
    try:
        _remove_stale(Path(tempfile.gettempdir()).glob(f"{prefix}*"))
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise OutputError(
            f"temporary files cannot be written: {error.strerror}; let TMPDIR name a folder with room for them"
        ) from error
    with folder as name, locked(Path(name)):
        yield Path(name)


def unnamed_file(label: str) -> int:
    """The descriptor of an empty file without a name, in memory where the system has that; above 2.

    A system without a writable folder has memory still. A descriptor of a standard stream that this process was
    started without would become the stream of a child.
    """
    if hasattr(os, "memfd_create"):  # Linux
        handle = os.memfd_create(label)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    if handle > 2:
        return handle
    try:
        return fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(handle)


def forget_cached(path: Path) -> None:
    """Write a file through to the disk and let the system drop its pages.

    Linux keeps what was written at once in pages of megabytes, and maps one of them whole for the first row that a
    process touches: 23 MiB more for a token table of 27 than after the file is read from the disk again.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read once as long as the file does not change.

    Raises:
        InputError: it cannot be read.
    """
    try:
        stat = path.stat()
        return _file_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error


@functools.lru_cache
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
