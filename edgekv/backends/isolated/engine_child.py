"""The child process of edgekv.backends.isolated.backend, which opens one engine and serves it.

Run as `python -m edgekv.backends.isolated.engine_child MEMORY_FD`, the descriptor of a SharedLogits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import Backend, Interrupted
from edgekv.backends.isolated.child import Parent
from edgekv.backends.isolated.shared_logits import SharedLogits
from edgekv.backends.open import model_identity, open_backend, open_language
from edgekv.cache.policies.settings import Eviction
from edgekv.cache.rows import CacheRows, row_nbytes
from edgekv.documents import decode, encode
from edgekv.host.memory import release_code, release_heap
from edgekv.source import Array
from edgekv.tokenizer.language import Language

LONG_TEXT = 4096  # characters: encoding more takes memory that is worth giving back
PIECE = 512  # tokens between two checks of the abort flag, for engines that do not check it


class Engine:
    """Requests to an engine, one per public method. Those that run the model return False if interrupted."""

    _path: Path
    _backend: Backend

    def __init__(self, shared: SharedLogits) -> None:
        self._shared = shared

    def open(self, path: str, eviction: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
        """Open the engine with open_backend's arguments; returns its attributes."""
        self._path = Path(path)
        options["eviction"] = decode(Eviction, eviction) if eviction else None
        backend = self._backend = open_backend(self._path, abort_flag=self._shared.abort_flag, **options)
        self._shared.map_rows(backend.n_vocab)
        _release_memory()
        names = ("name", "kernel", "n_ctx", "n_ctx_train", "n_vocab")
        attributes = {name: getattr(backend, name) for name in names}
        return {**attributes, "cache_nbytes": backend.cache_nbytes()}

    def prefill(self, tokens: list[int]) -> bool:
        """Append tokens; the logits of the last one go to row 0."""
        return self._run(lambda: self._prefill(tokens))

    def prefill_all(self, tokens: list[int]) -> bool:
        """Append at most MAX_ROWS tokens; the logits of token t go to row t."""
        return self._run(lambda: self._backend.prefill_all(tokens))

    def trim(self, n_past: int) -> None:
        """Drop every cached token from position `n_past` on, or all of them."""
        self._backend.trim(n_past)
        self._shared.header.n_past = self._backend.n_past

    def layout(self) -> list[dict[str, Any]]:
        """What the cache holds of every token, as plain values."""
        planes: list[dict[str, Any]] = encode(self._backend.layout())
        self._shared.header.n_past = self._backend.n_past
        return planes

    def identity(self) -> dict[str, Any]:
        """The edgekv.models.identity.ModelIdentity, as plain values."""
        found: dict[str, Any] = encode(model_identity(self._path))
        _release_memory()
        return found

    def save(self, start: int) -> None:
        """Write the cached rows from token `start` on to the shared memory."""
        rows = self._backend.save(start)
        self._shared.map_bytes(len(rows.data))[:] = rows.data
        _release_memory()

    def load(self, n_tokens: int) -> None:
        """Put rows of the shared memory in the place of all that is cached."""
        layout = self._backend.layout()
        data = self._shared.map_bytes(n_tokens * row_nbytes(layout))
        try:
            self._backend.load(CacheRows(layout, n_tokens, data))
        finally:
            self._shared.header.n_past = self._backend.n_past
            _release_memory()

    def collect_attention(self, on: bool) -> None:
        """Add up the attention that cached rows get, or stop."""
        self._backend.collect_attention(on)

    def attention_mass(self) -> int:
        """Write the attention mass (layers, n_past) to the shared memory; returns how many layers there are."""
        mass = self._backend.attention_mass()
        self._shared.map_bytes(mass.nbytes)[:] = mass.reshape(-1).view(np.uint8)
        return len(mass)

    def language(self) -> dict[str, Any]:
        """The attributes of the model's edgekv.tokenizer.language.Language."""
        attributes = {name: getattr(self._language, name) for name in ("chat_template", "bos_id", "eos_id")}
        return {**attributes, "stop_ids": sorted(self._language.stop_ids)}

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
            self._shared.header.n_past = self._backend.n_past

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
    """Give memory back that only loading or encoding needed."""
    release_heap()
    release_code()


if __name__ == "__main__":
    Parent().serve(Engine(SharedLogits(int(sys.argv[1]))))
