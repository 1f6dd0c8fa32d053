"""The child process of edgekv.backends.isolated.backend: opens one engine and serves it until its pipe closes.

Run as `python -m edgekv.backends.isolated.engine_child READ_FD WRITE_FD MEMORY_FD CONFIG`, where CONFIG is a
JSON object of open_backend's arguments.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from edgekv.backends.base import Backend, Interrupted
from edgekv.backends.isolated.channel import ChannelClosed, Op, Pipe, SharedLogits, Status
from edgekv.backends.open import open_backend, open_language
from edgekv.errors import BackendError, EdgeKVError
from edgekv.host.memory import release_code, release_heap
from edgekv.tokenizer.language import Language

LONG_TEXT = 4096  # bytes; the work of encoding more is worth giving back
PIECE = 512  # tokens between two looks at the abort flag, for engines that cannot look themselves


def main(read_fd: int, write_fd: int, memory_fd: int, config: str) -> None:
    """Open the engine, tell what it is, serve requests."""
    pipe, shared = Pipe(read_fd, write_fd), SharedLogits(memory_fd)
    options = json.loads(config)
    path = Path(options.pop("path"))
    try:
        backend = open_backend(path, abort_flag=shared.abort_flag, **options)
    except Exception as error:
        pipe.send_reply(Status.ERROR, 0, _describe(error))
        return
    shared.map_rows(backend.n_vocab)
    _release_memory()
    about = {
        "name": backend.name,
        "n_ctx": backend.n_ctx,
        "n_vocab": backend.n_vocab,
        "cache_nbytes": backend.cache_nbytes(),
    }
    pipe.send_reply(Status.OK, 0, json.dumps(about))
    server = _Server(path, pipe, backend, shared)
    try:
        while True:
            server.serve(*pipe.receive_request())
    except ChannelClosed:
        backend.close()


class _Server:
    """Answers one request after the other."""

    def __init__(self, path: Path, pipe: Pipe, backend: Backend, shared: SharedLogits) -> None:
        self._path = path
        self._pipe = pipe
        self._backend = backend
        self._shared = shared

    def serve(self, op: Op, numbers: list[int]) -> None:
        """Do it and reply.

        Raises:
            ChannelClosed: nobody waits for the reply.
        """
        try:
            text = (
                self._text(op, numbers)
                if op in (Op.LANGUAGE, Op.ENCODE, Op.TOKEN)
                else self._run(op, numbers)
            )
            self._pipe.send_reply(Status.OK, self._backend.n_past, text)
        except Interrupted:
            self._shared.set_abort(False)
            self._pipe.send_reply(Status.INTERRUPTED, self._backend.n_past)
        except ChannelClosed:
            raise
        except Exception as error:
            self._pipe.send_reply(Status.ERROR, self._backend.n_past, _describe(error))

    def _run(self, op: Op, numbers: list[int]) -> str:
        backend, shared = self._backend, self._shared
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
        return ""

    @functools.cached_property
    def _language(self) -> Language:
        language = open_language(self._backend, self._path)
        _release_memory()
        return language

    def _text(self, op: Op, numbers: list[int]) -> str:
        language = self._language
        if op is Op.ENCODE:
            text = bytes(numbers[2:]).decode()
            ids = language.encode(text, add_special=bool(numbers[0]), parse_special=bool(numbers[1]))
            if len(text) > LONG_TEXT:
                _release_memory()
            return json.dumps(ids)
        if op is Op.TOKEN:
            shown = language.token_bytes(numbers[0]).decode("latin-1")
            return json.dumps([shown, language.is_control(numbers[0])])
        return json.dumps(
            {
                "chat_template": language.chat_template,
                "bos_id": language.bos_id,
                "eos_id": language.eos_id,
                "stop_ids": sorted(language.stop_ids),
            }
        )


def _release_memory() -> None:
    """Give back what loading or encoding took and nothing needs from here on."""
    release_heap()
    release_code()


def _describe(error: Exception) -> str:
    """An error as JSON; one that EdgeKV did not raise on purpose becomes a BackendError."""
    if isinstance(error, EdgeKVError):
        return json.dumps([type(error).__name__, str(error)])
    return json.dumps([BackendError.__name__, f"the engine failed: {type(error).__name__}: {error}"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
