"""Standard streams that are closed, full, or of another encoding than UTF-8."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def prepare_streams() -> None:
    """Make the standard streams usable, however this process was started.

    A stream that was closed becomes /dev/null: else the next file that is opened would take its descriptor. A letter
    that the terminal's encoding lacks becomes "?", and a byte that is no letter in it U+FFFD.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (stays open)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Write out what Python still holds of standard output, while an error can still be reported."""
    with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
        sys.stdout.flush()
        return
    _discard_output()


def is_lost_output(error: OSError) -> bool:
    """Whether the error is one of writing to a standard stream, such as a full disk behind `>`."""
    return error.errno in _NO_ROOM and error.filename is None


def report_lost_output(error: OSError) -> None:
    """Say that the output is lost, where that can still be said."""
    _discard_output()
    with contextlib.suppress(OSError):
        print(
            f"edgekv: error: standard output cannot be written: {error.strerror}; free some space there",
            file=sys.stderr,
            flush=True,
        )


def _discard_output() -> None:
    """Let what is still held of standard output go nowhere: Python would fail with it once more when it ends."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
