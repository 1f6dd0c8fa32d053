"""Packs: documents that were prefilled once, put in front of a question without a prefill.

A pack's rows are those of `before_documents` of its PromptFormat, then of the documents. The first pack of a prompt is
taken as it is; a later one loses the rows in front of its documents and is moved behind the pack before it. Its rows
have not seen that pack, so its first tokens, on which others lean as on a start, are computed anew where they stand
(LegoLink in EPIC, arXiv 2410.15332).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgekv.backends.base import Backend
from edgekv.cache.rows import CacheRows, Layout
from edgekv.cache.rows_file import Header, Stored, read_rows_file, write_rows_file
from edgekv.chat.rotation import moved, require_movable
from edgekv.chat.saved import require_same_model
from edgekv.documents import Document, SchemaError, decode
from edgekv.errors import InputError, UnsupportedError
from edgekv.models.identity import ModelIdentity
from edgekv.progress import Progress, ignore
from edgekv.tokenizer.language import Language

PIECE = 128  # tokens prefilled between two reports of progress
HEADS = 16  # first tokens of a later pack that are computed anew


class PackNotes(Document, frozen=True):
    """What a pack holds beside rows: how many tokens stand in front of its documents, and their names."""

    n_before: int
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Pack:
    """A pack as it was read."""

    path: Path
    stored: Stored
    notes: PackNotes

    @property
    def before(self) -> list[int]:
        """The tokens in front of the documents."""
        return self.stored.tokens[: self.notes.n_before]

    @property
    def documents(self) -> list[int]:
        """The documents' tokens."""
        return self.stored.tokens[self.notes.n_before :]


def read_pack(path: Path) -> Pack:
    """Read and check a pack.

    Raises:
        InputError: it is none, of another version, or damaged: a pack is used whole or not at all.
    """
    stored = read_rows_file(path, "edgekv.pack")
    if stored.damage:
        raise InputError(
            f"{path}: is damaged ({stored.damage}); copy it again, or make it again with `edgekv pack`"
        )
    try:
        notes = decode(PackNotes, stored.notes)
    except SchemaError as error:
        raise InputError(
            f"{path}: its notes are damaged ({error}); make it again with `edgekv pack`"
        ) from None
    if not 0 <= notes.n_before < len(stored.tokens):
        raise InputError(f"{path}: holds no documents; make it again with `edgekv pack`")
    return Pack(path, stored, notes)


def document_tokens(language: Language, texts: Sequence[str]) -> list[int]:
    """Tokens of documents as they stand in a prompt: each ends with an empty line; none can spell a control token."""
    return [token for text in texts for token in language.encode(text.strip() + "\n\n")]


def write_pack(
    path: Path,
    backend: Backend,
    model: ModelIdentity,
    before: Sequence[int],
    documents: Sequence[int],
    names: Sequence[str],
    *,
    force: bool,
    progress: Progress = ignore,
) -> int:
    """Prefill documents and write their pack; returns its bytes.

    Raises:
        BackendError: they do not fit the context, or the engine failed.
        UnsupportedError: the engine cannot save this model's cache.
        OutputError: the file exists without `force`, or cannot be written.
    """
    tokens = [*before, *documents]
    layout = backend.layout()
    backend.trim(0)
    for start in range(0, len(tokens), PIECE):
        backend.prefill(tokens[start : start + PIECE])
        progress(min(start + PIECE, len(tokens)), len(tokens))
    header = Header.of("edgekv.pack", model, layout)
    notes = PackNotes(len(before), tuple(names))
    return write_rows_file(path, header, tokens, backend.save(), notes, force=force)


class Cache(Protocol):
    """What packs are put into: a Backend, or one of several sequences, with those methods of Backend."""

    @property
    def n_ctx(self) -> int: ...
    def layout(self) -> Layout: ...
    def prefill(self, tokens: Sequence[int]) -> object: ...
    def save(self, start: int = 0) -> CacheRows: ...
    def load(self, rows: CacheRows) -> None: ...


def place_packs(
    backend: Cache, model: ModelIdentity, packs: Sequence[Pack], before: Sequence[int], heads: int = HEADS
) -> list[int]:
    """Put packs into an empty cache, one behind the other; returns the tokens that are cached then.

    Args:
        before: the tokens in front of the documents.
        heads: how many first tokens of a moved pack are computed anew.

    Raises:
        InputError: a pack is of another model or cache, or they do not fit the context.
        UnsupportedError: rows would have to be moved, and cannot.
    """
    layout = backend.layout()
    for pack in packs:
        require_same_model(pack.path, pack.stored.header, model, layout)
    first = packs[0].before == list(before)
    if not first and not model.is_latent:
        raise UnsupportedError(
            f"{packs[0].path}: was made for a prompt that begins otherwise, with or without a chat template; make it "
            "again for this one"
        )
    if len(packs) > 1 or not first:
        require_movable(model, layout)
    n_tokens = len(before) + sum(len(pack.documents) for pack in packs)
    if n_tokens >= backend.n_ctx:
        raise InputError(
            f"the packs take {n_tokens} tokens and the context holds {backend.n_ctx}; leave one out, or take a larger "
            "--ctx-size"
        )
    placed = _Placed(backend, layout)
    if first:
        placed.add(packs[0].stored.tokens, packs[0].stored.rows())
    else:
        placed.compute(before)
    for pack in packs[first:]:
        documents, n_before = pack.documents, pack.notes.n_before
        distance = len(placed.tokens) - n_before
        body = pack.stored.rows().part(n_before, len(pack.stored.tokens))
        n_heads = min(heads, len(documents))
        placed.compute(documents[:n_heads])
        placed.add(documents[n_heads:], moved(body.part(n_heads, body.n_tokens), model, distance))
    placed.load()
    return placed.tokens


class _Placed:
    """Rows in the order of a prompt, some of them computed by the engine where they stand."""

    def __init__(self, backend: Cache, layout: Layout) -> None:
        self._backend = backend
        self._rows = CacheRows.empty(layout, 0)
        self.tokens: list[int] = []

    def add(self, tokens: Sequence[int], rows: CacheRows) -> None:
        """Append rows."""
        self._rows = CacheRows.join(rows.layout, [self._rows, rows])
        self.tokens += tokens

    def compute(self, tokens: Sequence[int]) -> None:
        """Append the rows that the engine computes for tokens behind those that are placed."""
        if tokens:
            self.load()
            self._backend.prefill(tokens)
            self.add(tokens, self._backend.save(len(self.tokens)))

    def load(self) -> None:
        """Put all rows into the engine."""
        self._backend.load(self._rows)
