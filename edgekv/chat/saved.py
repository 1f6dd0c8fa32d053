"""Sessions in files: turns and cache, saved after each answer and gone on with later."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.cache.rows import CacheRows, Layout, cache_type_of, row_nbytes
from edgekv.cache.rows_file import Header, Stored, append_rows, read_rows_file, write_rows_file
from edgekv.chat.session import ChatSession, PromptFormat, Turn
from edgekv.documents import Document, SchemaError, decode
from edgekv.errors import BackendError, InputError
from edgekv.files import locked
from edgekv.models.identity import ModelIdentity

MAX_CTX_SIZE = 2**24
SPARE_NBYTES = 2**20  # that later saves may have replaced before the file is written anew


class Notes(Document, frozen=True):
    """What a session's file holds beside the cache. `turns` are pairs of question and answer."""

    system: str
    turns: tuple[tuple[str, str], ...]
    unanswered: str | None
    documents: tuple[int, ...]
    ctx_size: int


@dataclass(frozen=True)
class SavedSession:
    """A session as it was read."""

    stored: Stored
    notes: Notes

    @property
    def summary(self) -> str:
        """What was found, in words."""
        turns, tokens = len(self.notes.turns), len(self.stored.tokens)
        words = f"{turns} turn{'' if turns == 1 else 's'}, {tokens:,} tokens in the cache"
        return f"{words}; damaged: {self.stored.damage}" if self.stored.damage else words


def read_session(path: Path) -> SavedSession | None:
    """A session's file; None where there is none yet.

    Raises:
        InputError: it is no session, of another version, or damaged past use.
    """
    if not path.exists():
        return None
    stored = read_rows_file(path, "edgekv.session")
    try:
        notes = decode(Notes, stored.notes)
        if not 0 < notes.ctx_size <= MAX_CTX_SIZE:
            raise SchemaError("ctx_size", f"{notes.ctx_size} tokens")
        return SavedSession(stored, notes)
    except SchemaError as error:
        raise InputError(f"{path}: its notes are damaged ({error}); remove it to begin anew") from None


def require_same_model(path: Path, header: Header, model: ModelIdentity, layout: Layout) -> None:
    """Raise InputError, and say why, unless a file's rows are of this model and of this engine's layout."""
    made = header.model
    if made != model:
        what = f"{made.name}, not {model.name}" if made.name != model.name else f"another {model.name}"
        why = "other weights" if made.tensors != model.tensors else "another cache"
        raise InputError(
            f"{path}: was made with {what} ({why}); open the model that it was made with, or name another file"
        )
    if header.layout and layout and header.layout != layout:
        theirs, ours = cache_type_of(header.layout), cache_type_of(layout)
        if theirs != ours:
            why, what = (
                f"was made with a cache in {theirs}, and this engine keeps {ours}",
                f"--cache-type {theirs}",
            )
        else:
            why, what = (
                f"was made by an engine that keeps {ours} otherwise",
                "the engine that it was made with",
            )
        raise InputError(f"{path}: {why}; open the model with {what}, or name another file")


class SessionKeeper:
    """Keeps a conversation in a file, which no other process may hold meanwhile.

    What was saved before is put into the session and the backend's cache. Rows that are in the file already are not
    written again; where later answers took the place of many, the file is written anew.

    Args:
        layout: of the backend's rows; empty for an engine that cannot save them: turns alone are kept then.

    Raises:
        InputError: the file is of another model or cache, or another process holds it.
        OutputError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        saved: SavedSession | None,
        model: ModelIdentity,
        layout: Layout,
        session: ChatSession,
        prompt_format: PromptFormat,
    ) -> None:
        self._path, self._session, self._format = path, session, prompt_format
        self._header = Header.of("edgekv.session", model, layout)
        self._tokens: list[int] = []
        self._end: int | None = None
        self._notes: Notes | None = None
        self._held = contextlib.ExitStack()
        if saved is not None:
            require_same_model(path, saved.stored.header, model, layout)
            self._hold()
            if path.stat().st_size != saved.stored.size:
                raise InputError(
                    f"{path}: another conversation went on with this session meanwhile; try again"
                )
            self._adopt(saved)
        else:
            self.save()

    def _adopt(self, saved: SavedSession) -> None:
        notes, stored, session = saved.notes, saved.stored, self._session
        session.turns[:] = [Turn(*turn) for turn in notes.turns]
        session.unanswered = notes.unanswered
        session.system = session.system or notes.system
        self._format.documents = self._format.documents or notes.documents
        if stored.header.layout == self._header.layout:
            self._end, self._notes, self._tokens = stored.end, notes, stored.tokens
            if stored.tokens and not session.generator.cached:
                session.generator.backend.load(stored.rows())
                session.generator.adopt(stored.tokens)

    def save(self) -> None:
        """Save what is new.

        Raises:
            OutputError: the file cannot be written; it is as it was.
        """
        notes = self._current_notes()
        cached = self._session.generator.cached if self._header.layout else []
        shared = _n_shared(self._tokens, cached)
        start = len(self._tokens) if shared == len(cached) else shared
        rows = self._rows(start)
        if rows is None:  # the engine died: what the file has is right still
            start, rows = len(self._tokens), CacheRows.empty(self._header.layout, 0)
        if self._end is not None and not rows.n_tokens and notes == self._notes:
            return
        if self._end is None or (rows.n_tokens and self._is_wasteful(start + rows.n_tokens)):
            self._write(notes, cached)
        else:
            new = cached[start:]
            self._end = append_rows(self._path, self._end, start, new, rows, notes)
            self._tokens = [*self._tokens[:start], *new]
        self._notes = notes

    def close(self) -> None:
        """Save what is new, and let others have the file."""
        try:
            self.save()
        finally:
            self._held.close()

    def _write(self, notes: Notes, cached: Sequence[int]) -> None:
        rows = self._rows(0) or CacheRows.empty(self._header.layout, 0)
        self._tokens = list(cached[: rows.n_tokens])
        self._end = write_rows_file(self._path, self._header, self._tokens, rows, notes)
        self._hold()

    def _rows(self, start: int) -> CacheRows | None:
        """Cached rows from a token on; None where the engine cannot give them."""
        backend = self._session.generator.backend
        if not self._header.layout or start >= backend.n_past:
            return CacheRows.empty(self._header.layout, 0)
        try:
            return backend.save(start)
        except BackendError:
            return None

    def _is_wasteful(self, n_tokens: int) -> bool:
        assert self._end is not None
        live = n_tokens * (row_nbytes(self._header.layout) + 4)
        return self._end > 2 * live + SPARE_NBYTES

    def _current_notes(self) -> Notes:
        session = self._session
        return Notes(
            system=session.system,
            turns=tuple((turn.question, turn.answer) for turn in session.turns),
            unanswered=session.unanswered,
            documents=tuple(self._format.documents),
            ctx_size=session.generator.backend.n_ctx,
        )

    def _hold(self) -> None:
        """Lock the file, which may be a new one under the old name."""
        held = contextlib.ExitStack()
        try:
            held.enter_context(locked(self._path, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"{self._path}: another conversation has this session open; end it, or name another file"
            ) from error
        self._held.close()
        self._held = held


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
