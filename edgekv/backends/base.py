"""What every inference engine offers; generation, chat, bench and eval are written against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgekv.errors import BackendError, InputError
from edgekv.source import Array

DEFAULT_N_CTX = 4096  # at most, where a caller does not say


class Interrupted(Exception):
    """A call was told to stop before its end; what it had processed stays in the cache."""


class Backend(Protocol):
    """One model, one sequence, one cache. Not thread-safe.

    A backend holds `n_past` tokens in its cache. `prefill` and `decode` append to it.
    """

    name: str
    n_ctx: int
    n_vocab: int

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of the last one, shape (vocab,).

        Raises:
            BackendError: the cache has no room for them, or the engine failed.
        """

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of every one, shape (T, vocab)."""

    def decode(self, token: int) -> Array:
        """Append one token; its logits, shape (vocab,)."""

    def trim(self, n_past: int) -> None:
        """Forget every cached token from position `n_past` on. Never shifts what stays."""

    def cache_nbytes(self) -> int:
        """Bytes the engine really allocated for its cache (all of n_ctx)."""

    def close(self) -> None:
        """Free the model."""


def require_positive(**options: int | None) -> None:
    """Raise InputError that names an option below 1; None is one that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def require_room(backend: Backend, count: int) -> None:
    """Raise BackendError unless `count` more tokens fit the cache; an engine checks before it touches it."""
    assert count > 0
    if backend.n_past + count > backend.n_ctx:
        raise BackendError(
            f"the cache holds {backend.n_past} of {backend.n_ctx} tokens and {count} more do not fit; "
            "open the model with a larger context"
        )
