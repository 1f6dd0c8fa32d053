"""What servers of one model ask of each other's engines: what is cached here, its rows, and to take rows from there.

Rows travel as a file of them (edgekv.cache.rows_file). Who asks for rows names a block by its hash, and so knows the
tokens already; who takes rows believes nothing of the file that its checksums, the model and the tokens do not confirm.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekv.backends.sequences import Sequences
from edgekv.cache.rows import CacheRows, row_nbytes
from edgekv.cache.rows_file import Header, read_rows_file, write_rows
from edgekv.documents import dumps
from edgekv.errors import InputError, to_wire
from edgekv.files import temporary_folder
from edgekv.serve.engine.blocks import BLOCK, block_hashes
from edgekv.serve.engine.disk import NoNotes
from edgekv.serve.engine.rates import measure
from edgekv.serve.engine.scheduler import Scheduler, Send

CATALOGUE_EVERY_S = 1.0
MARK_NBYTES = 4  # of each hash in a catalogue of, say, 16,000: one in 270,000 others seems to be there


class Exchange:
    """Beside a scheduler, whose cache it looks into.

    Args:
        header: of files with this engine's rows.
        send: takes {"id", "n_prompt", "n_held", "blocks", "seconds"} of `look`, {"id", "done": True} of `offer` and
            `take`, or {"id", "error": (class, message)}; and {"catalogue": {"generation", "marks"}} once it changed.
    """

    def __init__(self, scheduler: Scheduler, engine: Sequences, header: Header, send: Send) -> None:
        self._scheduler, self._engine, self._header, self._send = scheduler, engine, header, send
        self._started = secrets.token_hex(4)
        self._told, self._told_at = -1, 0.0

    def about(self) -> dict[str, Any]:
        """What the parent has to know: a fingerprint that servers must share, and bytes of a token's rows."""
        whole = dumps((self._header.model, self._header.layout)).encode()
        fingerprint = hashlib.sha256(whole).hexdigest()
        return {"fingerprint": fingerprint, "row_nbytes": row_nbytes(self._header.layout)}

    def measure(self) -> None:
        """Measure the engine's speeds while nothing is cached: a few seconds, after which nothing is again."""
        tokens = measure(self._engine, self._scheduler.rates)
        rows = self._engine.save(0)
        with temporary_folder("edgekv-rows-") as folder:
            self._write(folder / "rows", tokens, rows)
            self._engine.trim(0, 0)
            began = time.perf_counter()
            self._engine.load(0, read_rows_file(folder / "rows", "edgekv.prefix").rows())
            self._scheduler.rates.loaded(len(rows.data), time.perf_counter() - began)
        self._engine.trim(0, 0)

    def look(self, id: int, messages: list[dict[str, str]] | None, text: str | None, tokens: list[int] | None,
             packs: Sequence[str]) -> None:  # fmt: skip
        """Tell a prompt's hashes of blocks, how many of its tokens are here, and how long that took."""
        began = time.perf_counter()
        try:
            prompt, chosen = self._scheduler.prompt_of(messages, text, tokens, packs)
        except Exception as error:
            self._send({"id": id, "error": to_wire(error)})
            return
        origin = b"" if chosen is None else chosen.origin
        blocks = block_hashes(prompt, origin=origin)
        n_held = self._scheduler.prefixes.held(prompt, blocks, origin)
        if chosen is not None:
            n_held = max(n_held, len(chosen.tokens))
        told = {"n_prompt": len(prompt), "n_held": n_held, "blocks": [block.hex() for block in blocks]}
        self._send({"id": id, "seconds": time.perf_counter() - began, **told})

    def offer(self, id: int, block: str, count: int, path: str) -> None:
        """Write the rows of a block and all before it to a file."""
        try:
            began = time.perf_counter()
            found = self._scheduler.prefixes.rows_of(bytes.fromhex(block), count)
            if found is None:
                raise InputError("those rows are not here any more; ask for fewer, or compute them")
            self._write(Path(path), *found, began)
        except Exception as error:
            self._send({"id": id, "error": to_wire(error)})
            return
        self._send({"id": id, "done": True})

    def take(self, id: int, block: str, count: int, path: str) -> None:
        """Keep the rows of a file, if they are those of this block and all before it; a sequence has to be free."""
        try:
            began = time.perf_counter()
            tokens, rows = self._read(Path(path), bytes.fromhex(block), count)
            self._scheduler.prefixes.adopt(tokens, rows)
            self._scheduler.rates.loaded(len(rows.data), time.perf_counter() - began)
        except Exception as error:
            self._send({"id": id, "error": to_wire(error)})
            return
        self._send({"id": id, "done": True})

    def tell(self) -> None:
        """Send the catalogue if it has changed: the first bytes of the hashes of all blocks, sorted."""
        changes, now = self._scheduler.prefixes.n_changes, time.monotonic()
        if changes == self._told or now - self._told_at < CATALOGUE_EVERY_S:
            return
        self._told, self._told_at = changes, now
        marks = sorted(block[:MARK_NBYTES] for block in self._scheduler.prefixes.blocks())
        packed = base64.b64encode(b"".join(marks)).decode()
        self._send({"catalogue": {"generation": f"{self._started}-{changes}", "marks": packed}})

    def _write(self, path: Path, tokens: Sequence[int], rows: CacheRows, began: float | None = None) -> None:
        began = time.perf_counter() if began is None else began
        with path.open("wb") as file:
            write_rows(file, self._header, tokens, rows, NoNotes())
        self._scheduler.rates.saved(len(rows.data), time.perf_counter() - began)

    def _read(self, path: Path, block: bytes, count: int) -> tuple[list[int], CacheRows]:
        """Tokens and rows of a file; raises InputError unless all of it is what was asked for."""
        stored = read_rows_file(path, "edgekv.prefix")
        if stored.damage:
            raise InputError(f"the rows are damaged ({stored.damage}); fetch them again")
        if (stored.header.model, stored.header.layout) != (self._header.model, self._header.layout):
            raise InputError("the rows are of another model or cache type; ask a server of this one")
        if len(stored.tokens) != count or count % BLOCK or block_hashes(stored.tokens)[-1:] != [block]:
            raise InputError("the rows are of other tokens than was asked for; compute them")
        return stored.tokens, stored.rows()
