"""Errors that EdgeKV raises on purpose.

    EdgeKVError               exit code 1
    ├── InputError            exit code 2: what the user gave cannot be used
    │   ├── ModelFileError    a model file is malformed, truncated or lies about itself
    │   ├── UnsupportedError  well-formed, but of a kind that EdgeKV does not handle
    │   └── OutputError       the output cannot be written (exists, no folder, disk full)
    ├── BackendError          exit code 3: an engine failed to load or run a sound model
    └── ToleranceError        exit code 1: a comparison ran and went past its tolerance

A message says what is wrong, where, and what to do next.
"""

from __future__ import annotations


class EdgeKVError(Exception):
    """Base class; `exit_code` is the exit code of the command line."""

    exit_code = 1


class InputError(EdgeKVError):
    """The user's input cannot be used."""

    exit_code = 2


class ModelFileError(InputError):
    """A model file is malformed."""


class UnsupportedError(InputError):
    """The model is sound, but EdgeKV has no way to handle it."""


class OutputError(InputError):
    """The output cannot be written."""


class BackendError(EdgeKVError):
    """An inference engine failed."""

    exit_code = 3


class ToleranceError(EdgeKVError):
    """Two results differ by more than the tolerance asked for."""


_KINDS: list[type[EdgeKVError]] = [EdgeKVError, *EdgeKVError.__subclasses__(), *InputError.__subclasses__()]


def to_wire(error: Exception) -> tuple[str, str]:
    """Class name and message of an error for another process; other exceptions become BackendErrors."""
    if isinstance(error, EdgeKVError):
        return type(error).__name__, str(error)
    if isinstance(error, MemoryError):
        return BackendError.__name__, "out of memory; end other programs, or take a smaller context or model"
    return BackendError.__name__, f"the engine failed: {type(error).__name__}: {error}"


def from_wire(kind: str, message: str) -> EdgeKVError:
    """The error that `to_wire` was given; a BackendError if its class is unknown here."""
    return next((each for each in _KINDS if each.__name__ == kind), BackendError)(message)
