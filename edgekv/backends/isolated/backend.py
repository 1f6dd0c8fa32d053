"""A Backend in a child process, so that a crash of native code does not end the session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.base import Backend, Interrupted, require_loadable, require_room
from edgekv.backends.isolated.child import Child
from edgekv.backends.isolated.shared_logits import MAX_ROWS, SharedLogits
from edgekv.backends.kernel_names import Kernel
from edgekv.backends.open import Kind
from edgekv.cache.policies.settings import Eviction
from edgekv.cache.rows import CacheRows, Layout, Plane
from edgekv.documents import decode, encode
from edgekv.host.proc import peak_rss_nbytes
from edgekv.models.identity import ModelIdentity
from edgekv.source import Array
from edgekv.tokenizer.language import without_surrogates


class IsolatedBackend(Backend):
    """A Backend that runs another one in a child process.

    Logits come through shared memory, so a token costs two short lines in pipes. When the child dies, the
    call in progress and all that follow raise BackendError with the cause, `alive` turns false, and `restart`
    opens the engine again with an empty cache. The arguments are those of edgekv.backends.open.open_backend.

    Raises:
        InputError: an option is impossible, or the file is malformed or unsupported.
        BackendError: the engine is not installed, failed, or crashed while it loaded.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind | None = None,
        *,
        n_ctx: int | None = None,
        cache_type: str | None = None,
        n_threads: int | None = None,
        eviction: Eviction | None = None,
    ) -> None:
        options = {"kind": kind, "n_ctx": n_ctx, "cache_type": cache_type, "n_threads": n_threads}
        self._options = {"path": str(path), **options, "eviction": encode(eviction)}
        self._eviction = eviction
        self._calling, self.n_past = False, 0
        self._layout: Layout | None = None
        self._start()

    @property
    def alive(self) -> bool:
        """Whether the child is running."""
        return self._child.alive

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def n_cells(self) -> int:
        """Tokens that the cache has memory for: n_ctx, unless some are evicted."""
        return min(self._eviction.n_cells, self.n_ctx) if self._eviction else self.n_ctx

    def prefill(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        self._run("prefill", tokens)
        return self._shared.read(1).reshape(-1)

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        require_room(self, len(tokens))
        logits = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), MAX_ROWS):
            piece = tokens[start : start + MAX_ROWS]
            self._run("prefill_all", piece)
            logits[start : start + len(piece)] = self._shared.read(len(piece))
        return logits

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self.n_past, (n_past, self.n_past)
        if n_past < self.n_past:
            self.ask("trim", n_past=n_past)
            self.n_past = self._shared.header.n_past

    def layout(self) -> Layout:
        if self._layout is None:
            self._layout = tuple(decode(Plane, plane) for plane in self.ask("layout"))
        return self._layout

    def save(self, start: int = 0) -> CacheRows:
        assert 0 <= start <= self.n_past, (start, self.n_past)
        rows = CacheRows.empty(self.layout(), self.n_past - start)
        if rows.n_tokens:
            try:
                self.ask("save", start=start)
                rows.data[:] = self._shared.map_bytes(len(rows.data))
            finally:
                self._shared.drop_bytes()
        return rows

    def load(self, rows: CacheRows) -> None:
        require_loadable(self, rows)
        try:
            self._shared.map_bytes(len(rows.data))[:] = rows.data
            self.ask("load", n_tokens=rows.n_tokens)
        finally:
            self._shared.drop_bytes()
            self.n_past = self._shared.header.n_past

    def collect_attention(self, on: bool) -> None:
        self.ask("collect_attention", on=on)

    def attention_mass(self) -> Array:
        try:
            n_layers = self.ask("attention_mass")
            mass = self._shared.map_bytes(4 * n_layers * self.n_past).view(np.float32)
            return mass.reshape(n_layers, self.n_past).copy()
        finally:
            self._shared.drop_bytes()

    def interrupt(self) -> None:
        """End the call in progress, if there is one, with Interrupted. For signal handlers and threads."""
        if self._calling:
            self._shared.set_abort(True)

    def cache_nbytes(self) -> int:
        return self._cache_nbytes

    def language(self) -> EngineLanguage:
        """The model's vocabulary, held by the child alone; usable after a `restart` too.

        Raises:
            ModelFileError: the file's vocabulary is unusable.
            UnsupportedError: EdgeKV cannot read this kind of vocabulary.
        """
        return EngineLanguage(self)

    def identity(self) -> ModelIdentity:
        """Which model this is.

        Raises:
            ModelFileError: a file is malformed by now.
        """
        return decode(ModelIdentity, self.ask("identity"))

    def ask(self, action: str, **arguments: Any) -> Any:
        """The answer to a request, a method of edgekv.backends.isolated.engine_child.Engine.

        Raises:
            BackendError: the engine failed, or its process died.
        """
        return self._child.ask(action, **arguments)

    def peak_rss_nbytes(self) -> int | None:
        """The child's peak resident memory; None on systems without /proc."""
        return peak_rss_nbytes(self.pid)

    def restart(self) -> None:
        """Open the engine again, with an empty cache."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the child."""
        self._child.close()
        self._shared.close()

    def _start(self) -> None:
        shared = self._shared = SharedLogits.create()
        self._child = Child(
            "edgekv.backends.isolated.engine_child",
            str(shared.fd),
            out_of_memory="take a smaller --ctx-size or --cache-type q8_0",
            pass_fds=(shared.fd,),
        )
        try:
            about = self.ask("open", **self._options)
            shared.map_rows(about["n_vocab"])
        except BaseException:
            self.close()
            raise
        self.name: str = about["name"]
        self.kernel: Kernel = about["kernel"]
        self.n_ctx: int = about["n_ctx"]
        self.n_ctx_train: int | None = about["n_ctx_train"]
        self.n_vocab: int = about["n_vocab"]
        self.n_past = 0
        self._cache_nbytes: int = about["cache_nbytes"]
        self._layout = None

    def _run(self, action: str, tokens: Sequence[int]) -> None:
        self._calling = True
        try:
            if not self.ask(action, tokens=[int(token) for token in tokens]):
                raise Interrupted
        finally:
            self._calling = False
            self._shared.set_abort(False)
            self.n_past = self._shared.header.n_past


class EngineLanguage:
    """The vocabulary of an isolated engine's model, as an edgekv.tokenizer.language.Language."""

    def __init__(self, engine: IsolatedBackend) -> None:
        self._engine = engine
        about = engine.ask("language")
        self.chat_template: str | None = about["chat_template"]
        self.bos_id: int | None = about["bos_id"]
        self.eos_id: int | None = about["eos_id"]
        self.stop_ids: frozenset[int] = frozenset(about["stop_ids"])
        self._seen: dict[int, tuple[bytes, bool]] = {}

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Tokens of a text; BackendError if the engine's process died."""
        ids: list[int] = self._engine.ask(
            "encode", text=without_surrogates(text), add_special=add_special, parse_special=parse_special
        )
        return ids

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for."""
        return self._token(token)[0]

    def is_control(self, token: int) -> bool:
        """Whether this is a control token, such as the end of a turn, and not text."""
        return self._token(token)[1]

    def _token(self, token: int) -> tuple[bytes, bool]:
        if token not in self._seen:
            if not 0 <= token < self._engine.n_vocab:
                raise IndexError(f"token {token} is outside the vocabulary of {self._engine.n_vocab}")
            text, control = self._engine.ask("token", token=token)
            self._seen[token] = text.encode("latin-1"), control
        return self._seen[token]
