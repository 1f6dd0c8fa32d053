"""The engine's process: opens a model, then starts and stops jobs as its parent says.

Run as `python -m edgekv.serve.engine.child`. The first request, {"do": "open", ...}, is answered as
edgekv.backends.isolated.child says. After it come {"do": "start", "id": n, ...} and {"do": "stop", "id": n}, which are
answered by the messages of edgekv.serve.engine.scheduler, those of other servers, which edgekv.serve.engine.exchange
answers, and {"do": "end"}, which puts on the disk what is not there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekv.backends.isolated.child import Parent
from edgekv.backends.open import model_identity, open_sequences
from edgekv.cache.policies.settings import Eviction
from edgekv.cache.rows_file import Header
from edgekv.documents import decode
from edgekv.errors import to_wire
from edgekv.host.memory import release_code, release_heap
from edgekv.serve.engine.disk import Disk
from edgekv.serve.engine.exchange import Exchange
from edgekv.serve.engine.packs import PackFolder
from edgekv.serve.engine.scheduler import Scheduler

EXCHANGES = ("look", "offer", "take")  # messages that the exchange answers
IDLE_S = 2.0  # without a message, after which one more beginning goes to the disk


def open_scheduler(
    parent: Parent,
    path: str,
    packs: str | None,
    sessions: str | None,
    sessions_bytes: int,
    shares: bool,
    eviction: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Scheduler, Exchange | None, dict[str, Any]]:
    """A scheduler of a model opened with the options of `open_sequences`, an exchange with other servers if its rows
    are shared, and what the parent is to know of them."""
    wanted = decode(Eviction, eviction) if eviction else None
    engine = open_sequences(Path(path), eviction=wanted, **options)
    language = engine.language()
    about = {
        name: getattr(engine, name)
        for name in ("name", "kernel", "n_ctx", "n_ctx_train", "n_cells", "n_parallel")
    }
    folder = disk = exchange = None
    if packs or sessions or shares:
        kept = model_identity(Path(path)), engine.layout()
        folder = PackFolder(Path(packs), *kept) if packs else None
        disk = Disk(Path(sessions), sessions_bytes, *kept) if sessions else None
    about |= {"cache_nbytes": engine.cache_nbytes(), "has_template": language.chat_template is not None}
    about["packs"] = folder.about if folder else []
    scheduler = Scheduler(engine, language, parent.send, folder, disk)
    if shares:
        exchange = Exchange(scheduler, engine, Header.of("edgekv.prefix", *kept), parent.send)
        exchange.measure()
        about |= exchange.about()
    release_heap()
    release_code()
    return scheduler, exchange, about


def main() -> None:
    """Serve until the parent is gone."""
    parent = Parent()
    request = parent.receive()
    if request is None:
        return
    assert request.pop("do") == "open"
    try:
        scheduler, exchange, about = open_scheduler(parent, **request)
    except Exception as error:
        parent.send({"error": to_wire(error)})
        return
    parent.send({"ok": about})
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(parent, inbox), daemon=True).start()

    def tell() -> None:
        scheduler.tell()
        if exchange is not None:
            exchange.tell()

    tell()
    while True:
        while not scheduler.busy or not inbox.empty():
            if (message := _next(inbox, scheduler, tell)) is None:
                return
            do = message.pop("do")
            getattr(exchange if do in EXCHANGES else scheduler, do)(**message)
            if do == "end":
                return
            tell()
        scheduler.step()
        tell()


def _next(
    inbox: queue.SimpleQueue[dict[str, Any] | None], scheduler: Scheduler, tell: Callable[[], None]
) -> dict[str, Any] | None:
    """The next message. While none comes and nothing runs, what is kept goes to the disk, piece by piece."""
    saved = True
    while saved and not scheduler.busy:
        try:
            return inbox.get(timeout=IDLE_S)
        except queue.Empty:
            saved = scheduler.save_one()
            tell()
    return inbox.get()


def _read(parent: Parent, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    while True:
        message = parent.receive()
        inbox.put(message)
        if message is None:
            return


if __name__ == "__main__":
    main()
