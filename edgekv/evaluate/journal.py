"""Journals: files that a measurement appends each result to, so that kill -9 costs one window or one question.

Each belongs to one identity: model, engine, text and protocol, as a flat mapping. The
identity is hashed into the file's name and written out in its first line. Only one process may hold a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from platformdirs import user_cache_path

from edgekv.errors import InputError, OutputError
from edgekv.evaluate.model_under_test import ModelUnderTest
from edgekv.evaluate.workers import Run, Unit, run_units
from edgekv.files import locked

Identity = Mapping[str, str | int | None]


def default_folder() -> Path:
    """Where journals and reference distributions live by default."""
    return user_cache_path("edgekv") / "eval"


@contextmanager
def open_held(folder: Path, kind: str, identity: Identity, fresh: bool) -> Iterator[IO[bytes]]:
    """The file of an identity, open for reading and writing behind its first line, locked for this process.

    `fresh` empties it. The position is 0 behind the first line.

    Raises:
        OutputError: the folder cannot be made or written.
        InputError: another process holds the file.
    """
    header = json.dumps(dict(identity), sort_keys=True).encode() + b"\n"
    path = folder / f"{kind}-{hashlib.sha256(header).hexdigest()[:16]}"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+b"))  # a+ makes it if need be
            stack.enter_context(locked(path, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"another process is measuring the same thing ({path}); wait for it, or choose another --cache-dir"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another --cache-dir") from error
        file.seek(0)
        if fresh or file.readline() != header:
            file.truncate(0)
            file.write(header)
            file.flush()
        yield file


class Journal:
    """Results by index, one JSON line each: [index, value]. What was written before is in `done`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.done: dict[int, Any] = {}
        end = file.tell()
        for line in file:
            try:
                index, value = json.loads(line)
            except ValueError:  # cut short by a kill
                break
            if not line.endswith(b"\n"):
                break
            self.done[int(index)] = value
            end += len(line)
        file.truncate(end)

    def add(self, index: int, value: Any) -> None:
        """Append a result; the operating system has it before this returns."""
        self.done[index] = value
        self._file.write(json.dumps([index, value]).encode() + b"\n")
        self._file.flush()


@contextmanager
def open_journal(folder: Path, kind: str, identity: Identity, fresh: bool = False) -> Iterator[Journal]:
    """The journal of an identity; raises as `open_held` does."""
    with open_held(folder, kind, identity, fresh) as file:
        yield Journal(file)


def measure(
    subject: ModelUnderTest,
    run: Run,
    kind: str,
    identity: Identity,
    n_ctx: int,
    unit: Unit,
    items: Callable[[int], Any],
    count: int,
    summary: Callable[[dict[int, Any]], str] = lambda done: "",
) -> list[Any]:
    """unit(backend, items(i)) for i below count, going on from the journal of this subject and identity.

    Args:
        kind: what is measured; part of the journal's name.
        identity: all that decides the figures, besides the subject.
        summary: the figures so far, from results by index; called with one or more.

    Raises:
        InputError: an option is impossible, or another process holds the journal.
        BackendError: the engine is not installed, failed, or its process died.
    """
    with open_journal(run.folder, kind, subject.identity() | dict(identity), run.fresh) as journal:
        done = {i: journal.done[i] for i in range(count) if i in journal.done}
        left = [i for i in range(count) if i not in done]
        run.progress(len(done), count, summary(done) if done else "")
        if left:
            results = run_units(subject, n_ctx, run, unit, (items(i) for i in left))
            for i, result in zip(left, results, strict=True):
                done[i] = result
                journal.add(i, result)
                run.progress(len(done), count, summary(done))
    return [done[i] for i in range(count)]
