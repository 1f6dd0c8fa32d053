"""The engine's process: opens a model, then starts and stops jobs as its parent says.

Run as `python -m edgekv.serve.engine.child`. The first request, {"do": "open", ...}, is answered as
edgekv.backends.isolated.child says. After it come {"do": "start", "id": n, ...} and {"do": "stop", "id": n}, which are
answered by the messages of edgekv.serve.engine.scheduler, and {"do": "end"}, which puts on the disk what is not there.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from edgekv.backends.isolated.child import Parent
from edgekv.backends.open import model_identity, open_sequences
from edgekv.cache.policies.settings import Eviction
from edgekv.documents import decode
from edgekv.errors import to_wire
from edgekv.host.memory import release_code, release_heap
from edgekv.serve.engine.disk import Disk
from edgekv.serve.engine.packs import PackFolder
from edgekv.serve.engine.scheduler import Scheduler

IDLE_S = 2.0  # without a message, after which one more beginning goes to the disk


def open_scheduler(
    parent: Parent,
    path: str,
    packs: str | None,
    sessions: str | None,
    sessions_bytes: int,
    eviction: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Scheduler, dict[str, Any]]:
    """A scheduler of a model opened with the options of `open_sequences`, and what the parent is to know of it."""
    wanted = decode(Eviction, eviction) if eviction else None
    engine = open_sequences(Path(path), eviction=wanted, **options)
    language = engine.language()
    about = {
        name: getattr(engine, name)
        for name in ("name", "kernel", "n_ctx", "n_ctx_train", "n_cells", "n_parallel")
    }
    folder = disk = None
    if packs or sessions:
        kept = model_identity(Path(path)), engine.layout()
        folder = PackFolder(Path(packs), *kept) if packs else None
        disk = Disk(Path(sessions), sessions_bytes, *kept) if sessions else None
    about |= {"cache_nbytes": engine.cache_nbytes(), "has_template": language.chat_template is not None}
    about["packs"] = folder.about if folder else []
    release_heap()
    release_code()
    return Scheduler(engine, language, parent.send, folder, disk), about


def main() -> None:
    """Serve until the parent is gone."""
    parent = Parent()
    request = parent.receive()
    if request is None:
        return
    assert request.pop("do") == "open"
    try:
        scheduler, about = open_scheduler(parent, **request)
    except Exception as error:
        parent.send({"error": to_wire(error)})
        return
    parent.send({"ok": about})
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(parent, inbox), daemon=True).start()
    while True:
        while not scheduler.busy or not inbox.empty():
            if (message := _next(inbox, scheduler)) is None:
                return
            do = message.pop("do")
            getattr(scheduler, do)(**message)
            if do == "end":
                return
            scheduler.tell()
        scheduler.step()
        scheduler.tell()


def _next(inbox: queue.SimpleQueue[dict[str, Any] | None], scheduler: Scheduler) -> dict[str, Any] | None:
    """The next message. While none comes and nothing runs, what is kept goes to the disk, piece by piece."""
    saved = True
    while saved and not scheduler.busy:
        try:
            return inbox.get(timeout=IDLE_S)
        except queue.Empty:
            if saved := scheduler.save_one():
                scheduler.tell()
    return inbox.get()


def _read(parent: Parent, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    while True:
        message = parent.receive()
        inbox.put(message)
        if message is None:
            return


if __name__ == "__main__":
    main()
