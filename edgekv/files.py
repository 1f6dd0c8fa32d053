"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import OutputError


def check_output(path: Path, force: bool) -> None:
    """Refuse, before any work is done, an output that could not be written at its end.

    Raises:
        OutputError: the folder is missing, or `path` is a folder, or exists without `force`.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file to write")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; pass --force to replace it, or choose another name")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; create it first: mkdir -p {path.parent}")


@contextlib.contextmanager
def atomic_path(path: Path, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when not.

    A process killed in the block leaves at most a hidden `.<name>.*.partial`, never a half-written `path`.

    Raises:
        OutputError: the folder is missing or not writable, `path` exists without `force`, the disk is full.
    """
    check_output(path, force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(
            f"cannot write in {path.parent}: {error.strerror}; choose another folder"
        ) from error
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"writing {path} failed: {error.strerror or error}; nothing was left behind, free some space and "
            "try again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
