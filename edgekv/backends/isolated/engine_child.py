"""The child process of edgekv.backends.isolated.backend: opens one engine and serves it.

Run as `python -m edgekv.backends.isolated.engine_child MEMORY_FD`, the descriptor of a SharedLogits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekv.backends.base import Backend, Interrupted
from edgekv.backends.isolated.child import Parent
from edgekv.backends.isolated.shared_logits import SharedLogits
from edgekv.backends.open import open_backend, open_language
from edgekv.host.memory import release_code, release_heap
from edgekv.source import Array
from edgekv.tokenizer.language import Language

LONG_TEXT = 4096  # characters; the work of encoding more is worth giving back
PIECE = 512  # tokens between two looks at the abort flag, for engines that cannot look themselves


class Engine:
    """Answers requests; each public method is one. Those that run the model tell whether they came to their end."""

    _path: Path
    _backend: Backend

    def __init__(self, shared: SharedLogits) -> None:
        self._shared = shared

    def open(self, path: str, **options: Any) -> dict[str, Any]:
        """Open the engine by open_backend's arguments; what the parent has to know of it."""
        self._path = Path(path)
        backend = self._backend = open_backend(self._path, abort_flag=self._shared.abort_flag, **options)
        self._shared.map_rows(backend.n_vocab)
        _release_memory()
        return {
            "name": backend.name,
            "n_ctx": backend.n_ctx,
            "n_vocab": backend.n_vocab,
            "cache_nbytes": backend.cache_nbytes(),
        }

    def prefill(self, tokens: list[int]) -> bool:
        """Append tokens; the logits of the last one go to row 0."""
        return self._run(lambda: self._prefill(tokens))

    def prefill_all(self, tokens: list[int]) -> bool:
        """Append at most MAX_ROWS tokens; the logits of each go to its row."""
        return self._run(lambda: self._backend.prefill_all(tokens))

    def trim(self, n_past: int) -> None:
        """Forget every cached token from position `n_past` on."""
        self._backend.trim(n_past)
        self._shared.n_past = n_past

    def language(self) -> dict[str, Any]:
        """What edgekv.tokenizer.language.Language tells of the model as a whole."""
        language = self._language
        return {
            "chat_template": language.chat_template,
            "bos_id": language.bos_id,
            "eos_id": language.eos_id,
            "stop_ids": sorted(language.stop_ids),
        }

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of a text."""
        ids = self._language.encode(text, add_special, parse_special)
        if len(text) > LONG_TEXT:
            _release_memory()
        return ids

    def token(self, token: int) -> tuple[str, bool]:
        """A token's bytes, as Latin-1, and whether it is a control token."""
        return self._language.token_bytes(token).decode("latin-1"), self._language.is_control(token)

    def _run(self, action: Callable[[], Array]) -> bool:
        try:
            self._shared.write(action())
            return True
        except Interrupted:
            self._shared.set_abort(False)
            return False
        finally:
            self._shared.n_past = self._backend.n_past

    def _prefill(self, tokens: list[int]) -> Array:
        if len(tokens) == 1:
            return self._backend.decode(tokens[0])
        for start in range(0, len(tokens), PIECE):
            if self._shared.aborted:
                raise Interrupted
            logits = self._backend.prefill(tokens[start : start + PIECE])
        return logits

    @functools.cached_property
    def _language(self) -> Language:
        language = open_language(self._backend, self._path)
        _release_memory()
        return language


def _release_memory() -> None:
    """Give back what loading or encoding took and nothing needs from here on."""
    release_heap()
    release_code()


if __name__ == "__main__":
    Parent().serve(Engine(SharedLogits(int(sys.argv[1]))))
