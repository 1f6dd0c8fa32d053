"""The child process of edgekv.backends.isolated: opens one engine and serves it until its pipe closes.

Run as `python -m edgekv.backends.worker READ_FD WRITE_FD MEMORY_FD CONFIG`, where CONFIG is a JSON object of
open_backend's arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgekv.backends import open_backend
from edgekv.backends.base import Backend, Interrupted
from edgekv.backends.channel import ChannelClosed, Op, Pipe, SharedLogits, Status
from edgekv.errors import BackendError, EdgeKVError

PIECE = 512  # tokens between two looks at the abort flag, for engines that cannot look themselves


def main(read_fd: int, write_fd: int, memory_fd: int, config: str) -> None:
    """Open the engine, tell what it is, serve requests."""
    pipe, shared = Pipe(read_fd, write_fd), SharedLogits(memory_fd)
    try:
        backend = _open(json.loads(config), shared)
    except Exception as error:
        pipe.send_reply(Status.ERROR, 0, _describe(error))
        return
    shared.map_rows(backend.n_vocab)
    about = {
        "name": backend.name,
        "n_ctx": backend.n_ctx,
        "n_vocab": backend.n_vocab,
        "cache_nbytes": backend.cache_nbytes(),
    }
    pipe.send_reply(Status.OK, 0, json.dumps(about))
    try:
        while True:
            _serve(*pipe.receive_request(), pipe, backend, shared)
    except ChannelClosed:
        backend.close()


def _open(config: dict[str, object], shared: SharedLogits) -> Backend:
    path = Path(str(config.pop("path")))
    return open_backend(path, abort_flag=shared.abort_flag, **config)  # type: ignore[arg-type]


def _serve(op: Op, numbers: list[int], pipe: Pipe, backend: Backend, shared: SharedLogits) -> None:
    try:
        if op is Op.TRIM:
            backend.trim(numbers[0])
        elif op is Op.PREFILL_ALL:
            shared.write(backend.prefill_all(numbers))
        elif len(numbers) == 1:
            shared.write(backend.decode(numbers[0]))
        else:
            for start in range(0, len(numbers), PIECE):
                if shared.aborted:
                    raise Interrupted
                logits = backend.prefill(numbers[start : start + PIECE])
            shared.write(logits)
        pipe.send_reply(Status.OK, backend.n_past)
    except Interrupted:
        shared.set_abort(False)
        pipe.send_reply(Status.INTERRUPTED, backend.n_past)
    except ChannelClosed:
        raise
    except Exception as error:
        pipe.send_reply(Status.ERROR, backend.n_past, _describe(error))


def _describe(error: Exception) -> str:
    """An error as JSON; one that EdgeKV did not raise on purpose becomes a BackendError."""
    if isinstance(error, EdgeKVError):
        return json.dumps([type(error).__name__, str(error)])
    return json.dumps([BackendError.__name__, f"the engine failed: {type(error).__name__}: {error}"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
