"""Packs that requests can name: read when the server starts, and put in front of prompts without a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.backends.sequences import SequenceCache, Sequences
from edgekv.cache.rows import Layout
from edgekv.chat.packs import Pack, is_exact, place_packs, read_pack
from edgekv.chat.saved import require_same_model
from edgekv.errors import BackendError, EdgeKVError, InputError
from edgekv.models.identity import ModelIdentity

SUFFIX = ".pack"


@dataclass(frozen=True)
class Chosen:
    """Packs in front of one prompt.

    Attributes:
        documents: all their tokens.
        tokens: those and the ones before them, which the prompt begins with.
        origin: as in edgekv.serve.engine.blocks.block_hashes: packs behind others are not what a prefill computes.
    """

    packs: list[Pack]
    before: list[int]
    model: ModelIdentity

    @property
    def documents(self) -> list[int]:
        return [token for pack in self.packs for token in pack.documents]

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *self.documents]

    @property
    def origin(self) -> bytes:
        if is_exact(self.packs, self.before):
            return b""
        return "\0".join(pack.path.name for pack in self.packs).encode("utf-8", "surrogateescape")

    def put(self, engine: Sequences, sequence: int) -> None:
        """Put them into an empty sequence; raises as `place_packs` does."""
        place_packs(SequenceCache(engine, sequence), self.model, self.packs, self.before)


class PackFolder:
    """The packs of a folder, by their file's name without `.pack`.

    Attributes:
        about: each pack's `id`, `tokens` and `documents`, or the `error` for which it cannot be used.

    Raises:
        InputError: the folder cannot be read.
    """

    def __init__(self, folder: Path, model: ModelIdentity, layout: Layout) -> None:
        self._model, self._layout = model, layout
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        except OSError as error:
            raise InputError(f"cannot read packs in {folder}: {error.strerror}; check the path") from error
        self._paths: dict[str, Path] = {}
        self.about: list[dict[str, Any]] = []
        for path in paths:
            try:
                pack = self._read(path)
            except InputError as error:
                self.about.append({"id": path.stem, "error": str(error)})
                continue
            self._paths[path.stem] = path
            told = {"tokens": len(pack.documents), "documents": list(pack.notes.documents)}
            self.about.append({"id": path.stem, **told})

    def choose(self, names: Sequence[str], before: Sequence[int]) -> Chosen:
        """Packs by their names, behind the tokens `before` documents.

        Raises:
            InputError: there is no such pack.
            BackendError: a file has changed for the worse since the server started.
        """
        for name in names:
            if name not in self._paths:
                there = ", ".join(self._paths) or "none"
                raise InputError(f"there is no pack {name!r} here; there are: {there}")
        try:
            packs = [self._read(self._paths[name]) for name in names]
        except EdgeKVError as error:
            raise BackendError(f"a pack cannot be read any more: {error}") from error
        return Chosen(packs, list(before), self._model)

    def _read(self, path: Path) -> Pack:
        pack = read_pack(path)
        require_same_model(path, pack.stored.header, self._model, self._layout)
        return pack
