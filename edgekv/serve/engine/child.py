"""The engine's process: opens a model, then starts and stops jobs as its parent says.

Run as `python -m edgekv.serve.engine.child`. The first request, {"do": "open", ...}, is answered as
edgekv.backends.isolated.child says. After it come {"do": "start", "id": n, ...} and {"do": "stop", "id": n}, which are
answered by the messages of edgekv.serve.engine.scheduler.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from edgekv.backends.isolated.child import Parent
from edgekv.backends.open import open_sequences
from edgekv.errors import to_wire
from edgekv.host.memory import release_code, release_heap
from edgekv.serve.engine.scheduler import Scheduler


def open_scheduler(parent: Parent, path: str, **options: Any) -> tuple[Scheduler, dict[str, Any]]:
    """A scheduler of a model opened with the options of `open_sequences`, and what the parent is to know of it."""
    engine = open_sequences(Path(path), **options)
    language = engine.language()
    about = {
        name: getattr(engine, name)
        for name in ("name", "kernel", "n_ctx", "n_ctx_train", "n_cells", "n_parallel")
    }
    about |= {"cache_nbytes": engine.cache_nbytes(), "has_template": language.chat_template is not None}
    release_heap()
    release_code()
    return Scheduler(engine, language, parent.send), about


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
            if (message := inbox.get()) is None:
                return
            getattr(scheduler, message.pop("do"))(**message)
            scheduler.tell()
        scheduler.step()
        scheduler.tell()


def _read(parent: Parent, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    while True:
        message = parent.receive()
        inbox.put(message)
        if message is None:
            return


if __name__ == "__main__":
    main()
