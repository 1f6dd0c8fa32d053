"""The loop of every measurement: what the journal lacks is run and noted, unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekv.evaluate.journal import Identity, open_journal
from edgekv.evaluate.pool import Run, Unit, run_units
from edgekv.evaluate.subject import Subject


def measure(
    subject: Subject,
    run: Run,
    kind: str,
    identity: Identity,
    n_ctx: int,
    unit: Unit,
    items: Callable[[int], Any],
    count: int,
    summary: Callable[[dict[int, Any]], str] = lambda done: "",
) -> list[Any]:
    """unit(backend, items(i)) for i below count, going on from the journal of this subject and identity.

    Args:
        kind: what is measured; part of the journal's name.
        identity: all that decides the figures beside the subject.
        summary: the figures so far, from results by index; called with one or more.

    Raises:
        InputError: an option is impossible, or another process is measuring the same.
        BackendError: the engine is not installed, failed, or its process died.
    """
    with open_journal(run.folder, kind, subject.identity() | dict(identity), run.fresh) as journal:
        done = {i: journal.done[i] for i in range(count) if i in journal.done}
        left = [i for i in range(count) if i not in done]
        run.progress(len(done), count, summary(done) if done else "")
        if left:
            results = run_units(subject, n_ctx, run, unit, (items(i) for i in left))
            for i, result in zip(left, results, strict=True):
                done[i] = result
                journal.add(i, result)
                run.progress(len(done), count, summary(done))
    return [done[i] for i in range(count)]
