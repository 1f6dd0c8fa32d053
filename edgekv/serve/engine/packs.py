"""Packs that requests can name: read when the server starts, and put in front of prompts without a prefill."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.backends.sequences import SequenceCache, Sequences
from edgekv.cache.rows import CacheRows, Layout
from edgekv.chat.packs import Pack, place_packs, read_pack
from edgekv.chat.saved import require_same_model
from edgekv.errors import BackendError, InputError
from edgekv.models.identity import ModelIdentity
from edgekv.serve.engine.blocks import BlockIndex, block_hashes
from edgekv.serve.engine.disk import MIN_TOKENS

SUFFIX = ".pack"


@dataclass(eq=False)
class Known:
    """A pack of the folder; its rows stay in the file."""

    path: Path
    before: list[int]
    documents: array[int]
    used_at: int = 0

    @property
    def tokens(self) -> list[int]:
        """All its tokens, those in front of the documents first."""
        return [*self.before, *self.documents]


@dataclass(frozen=True)
class Chosen:
    """Packs in front of one prompt.

    Attributes:
        before: the tokens in front of the documents.
        documents: all their tokens.
        origin: as in edgekv.serve.engine.blocks.block_hashes: packs that are moved are not what a prefill computes.
    """

    folder: PackFolder
    packs: list[Known]
    before: list[int]

    @property
    def documents(self) -> list[int]:
        return [token for pack in self.packs for token in pack.documents]

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *self.documents]

    @property
    def origin(self) -> bytes:
        if len(self.packs) == 1 and self.packs[0].before == self.before:
            return b""
        return "\0".join(pack.path.name for pack in self.packs).encode("utf-8", "surrogateescape")

    def put(self, engine: Sequences, sequence: int) -> None:
        """Put them into an empty sequence.

        Raises:
            UnsupportedError: rows would have to be moved, and cannot.
            BackendError: a file has changed since the server started.
        """
        packs = [self.folder.read_again(pack) for pack in self.packs]
        place_packs(SequenceCache(engine, sequence), self.folder.model, packs, self.before)


class PackFolder:
    """The packs of a folder, by their file's name without `.pack`.

    A prompt that begins as a pack does, whether it names it or spells its text, finds its rows.

    Attributes:
        index: the packs by their blocks.
        about: each pack's `id`, `tokens` and `documents`, or the `error` for which it cannot be used.

    Raises:
        InputError: the folder cannot be read.
    """

    def __init__(self, folder: Path, model: ModelIdentity, layout: Layout) -> None:
        self.model, self._layout = model, layout
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        except OSError as error:
            raise InputError(f"cannot read packs in {folder}: {error.strerror}; check the path") from error
        self._known: dict[str, Known] = {}
        self.index: BlockIndex[Known] = BlockIndex()
        self.about: list[dict[str, Any]] = []
        for path in paths:
            try:
                pack = self._read(path)
            except InputError as error:
                self.about.append({"id": path.stem, "error": str(error)})
                continue
            known = self._known[path.stem] = Known(path, pack.before, array("i", pack.documents))
            self.index.add(known, block_hashes(known.tokens))
            told = {"tokens": len(pack.documents), "documents": list(pack.notes.documents)}
            self.about.append({"id": path.stem, **told})

    def choose(self, names: Sequence[str], before: Sequence[int]) -> Chosen:
        """Packs by their names, behind the tokens `before`.

        Raises:
            InputError: there is no such pack.
        """
        for name in names:
            if name not in self._known:
                there = ", ".join(self._known) or "none"
                raise InputError(f"there is no pack {name!r} here; there are: {there}")
        return Chosen(self, [self._known[name] for name in names], list(before))

    def find(
        self, prompt: Sequence[int], blocks: Sequence[bytes], more_than: int
    ) -> tuple[Known | None, int]:
        """The pack that has most of a prompt's first tokens, and how many; none where it is hardly more than given."""
        known, count = self.index.find(prompt, blocks)
        return (known, count) if count >= more_than + MIN_TOKENS else (None, 0)

    def load(self, known: Known, count: int) -> CacheRows | None:
        """The first rows of a pack; None where its file has changed, and then it is found no more."""
        try:
            return self.read_again(known).stored.rows(count)
        except BackendError:
            self.set_aside(known)
            return None

    def set_aside(self, known: Known) -> None:
        """Find a pack no more; requests that name it are told why."""
        self.index.discard(known, block_hashes(known.tokens))

    def read_again(self, known: Known) -> Pack:
        """A pack with its rows; raises BackendError if the file is not what it was."""
        try:
            pack = self._read(known.path)
        except InputError as error:
            raise BackendError(f"a pack cannot be read any more: {error}") from error
        if (pack.before, pack.documents) != (known.before, list(known.documents)):
            raise BackendError(f"{known.path}: has changed since the server started; start it again")
        return pack

    def _read(self, path: Path) -> Pack:
        pack = read_pack(path)
        require_same_model(path, pack.stored.header, self.model, self._layout)
        return pack
