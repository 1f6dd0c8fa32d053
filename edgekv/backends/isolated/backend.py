"""Any backend in a process of its own, so that a crash of native code does not take the session with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekv import errors
from edgekv.backends.base import Interrupted, require_room
from edgekv.backends.isolated.channel import MAX_ROWS, ChannelClosed, Op, Pipe, SharedLogits, Status
from edgekv.backends.open import Kind
from edgekv.errors import BackendError
from edgekv.host.proc import peak_rss_nbytes
from edgekv.source import Array
from edgekv.tokenizer.language import without_surrogates

CLOSE_TIMEOUT_S = 5.0


class IsolatedBackend:
    """edgekv.backends.base.Backend that runs another one in a child process.

    Logits come through shared memory, so a token costs two pipe messages of a few bytes. When the child
    dies, the call in progress and all that follow raise BackendError with the cause, `alive` turns false,
    and `restart` opens the engine anew with an empty cache.

    Raises:
        InputError: an option is impossible, or the file is malformed or unsupported.
        BackendError: the engine is not installed, failed, or crashed while it loaded.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind | None = None,
        *,
        n_ctx: int | None = None,
        cache_type: str | None = None,
        n_threads: int | None = None,
    ) -> None:
        options = {"n_ctx": n_ctx, "cache_type": cache_type, "n_threads": n_threads}
        self._config = json.dumps({"path": os.fspath(path), "kind": kind, **options})
        self._process: subprocess.Popen[bytes] | None = None
        self._calling = False
        self._start()

    @property
    def n_past(self) -> int:
        return self._n_past

    @property
    def alive(self) -> bool:
        """Whether the child still serves."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None
        return self._process.pid

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of the last one, shape (vocab,).

        Raises:
            BackendError: no room, the engine failed, or its process died.
            Interrupted: `interrupt` was called meanwhile; `n_past` tells how far it came.
        """
        require_room(self, len(tokens))
        self._call(Op.PREFILL, tokens)
        return self._shared.read(1).reshape(-1)

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of every one, shape (T, vocab)."""
        require_room(self, len(tokens))
        logits = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), MAX_ROWS):
            piece = tokens[start : start + MAX_ROWS]
            self._call(Op.PREFILL_ALL, piece)
            logits[start : start + len(piece)] = self._shared.read(len(piece))
        return logits

    def decode(self, token: int) -> Array:
        """Append one token; its logits, shape (vocab,)."""
        return self.prefill([token])

    def trim(self, n_past: int) -> None:
        assert 0 <= n_past <= self._n_past, (n_past, self._n_past)
        if n_past < self._n_past:
            self._call(Op.TRIM, [n_past])

    def interrupt(self) -> None:
        """Make the call in progress, if there is one, end with Interrupted. For signal handlers and threads."""
        if self._calling:
            self._shared.set_abort(True)

    def cache_nbytes(self) -> int:
        return self._cache_nbytes

    def language(self) -> EngineLanguage:
        """The model's vocabulary, held by the child alone; it outlives a `restart`.

        Raises:
            ModelFileError: the file's vocabulary is unusable.
            UnsupportedError: its kind is.
        """
        return EngineLanguage(self)

    def ask(self, op: Op, numbers: Sequence[int]) -> Any:
        """The child's JSON answer to an operation on texts.

        Raises:
            BackendError: the engine failed, or its process died.
        """
        return json.loads(self._call(op, numbers))

    def peak_rss_nbytes(self) -> int | None:
        """The child's largest resident memory so far; None where the system does not tell."""
        return peak_rss_nbytes(self.pid)

    def restart(self) -> None:
        """Open the engine anew, with an empty cache."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        self._shared.set_abort(True)  # a call that nobody waits for any more
        self._pipe.close()
        self._shared.close()
        self._output.close()
        try:
            process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        self._n_past = 0
        self._shared = SharedLogits.create()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        passed = (request_read, reply_write, self._shared.fd)
        self._process = subprocess.Popen(
            # -P: a folder named edgekv in the current directory must not shadow the installed one.
            [
                sys.executable,
                "-P",
                "-m",
                "edgekv.backends.isolated.engine_child",
                *map(str, passed),
                self._config,
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=passed,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent, which asks the child to stop
            # Python's own allocator would keep 3 MiB of what the vocabulary took while it was read.
            # ggml's abort would run gdb on the child for seconds.
            env={"PYTHONMALLOC": "malloc"} | os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        os.close(request_read)
        os.close(reply_write)
        self._pipe = Pipe(reply_read, request_write)
        try:
            about = json.loads(self._receive())
        except BaseException:
            self.close()
            raise
        self.name: str = about["name"]
        self.n_ctx: int = about["n_ctx"]
        self.n_vocab: int = about["n_vocab"]
        self._cache_nbytes: int = about["cache_nbytes"]
        self._shared.map_rows(self.n_vocab)

    def _call(self, op: Op, numbers: Sequence[int]) -> str:
        if self._process is None:
            raise BackendError("the engine is closed")
        self._calling = True
        try:
            self._pipe.send_request(op, numbers)
            return self._receive()
        except ChannelClosed:
            raise BackendError(self._cause_of_death()) from None
        finally:
            self._calling = False
            self._shared.set_abort(False)

    def _receive(self) -> str:
        """The reply's text; raises what it tells. Whatever else cuts the wait short ends the child,
        for its late reply would be taken for the next one."""
        try:
            status, self._n_past, text = self._pipe.receive_reply()
        except ChannelClosed:
            raise BackendError(self._cause_of_death()) from None
        except BaseException:
            self.close()
            raise
        if status is Status.INTERRUPTED:
            raise Interrupted
        if status is Status.ERROR:
            kind, message = json.loads(text)
            raise getattr(errors, kind)(message)
        return text

    def _cause_of_death(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._output.seek(0)
        lines = [line.strip() for line in self._output.read().decode("utf-8", "replace").splitlines()]
        last = "; ".join([line for line in lines if line][-2:])
        return f"the engine's process died: {_meaning(code)}" + (f" [{last}]" if last else "")


class EngineLanguage:
    """edgekv.tokenizer.language.Language of the model that an isolated engine runs."""

    def __init__(self, engine: IsolatedBackend) -> None:
        self._engine = engine
        about = engine.ask(Op.LANGUAGE, ())
        self.chat_template: str | None = about["chat_template"]
        self.bos_id: int | None = about["bos_id"]
        self.eos_id: int | None = about["eos_id"]
        self.stop_ids: frozenset[int] = frozenset(about["stop_ids"])
        self._seen: dict[int, tuple[bytes, bool]] = {}

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Tokens of a text; raises BackendError if the engine's process died."""
        numbers = [int(add_special), int(parse_special), *without_surrogates(text).encode()]
        return [int(token) for token in self._engine.ask(Op.ENCODE, numbers)]

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for."""
        return self._token(token)[0]

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model and is not part of the text."""
        return self._token(token)[1]

    def _token(self, token: int) -> tuple[bytes, bool]:
        if token not in self._seen:
            if not 0 <= token < self._engine.n_vocab:
                raise IndexError(f"token {token} is outside the vocabulary of {self._engine.n_vocab}")
            text, control = self._engine.ask(Op.TOKEN, [token])
            self._seen[token] = text.encode("latin-1"), bool(control)
        return self._seen[token]


def _meaning(code: int) -> str:
    if code >= 0:
        return f"it left with exit code {code}"
    name = signal.Signals(-code).name
    advice = {
        "SIGKILL": "; if memory ran out, take a smaller --ctx-size or --cache-type q8_0",
        "SIGILL": ": llama-cpp-python was compiled for another CPU; reinstall it on this one, "
        "or with CMAKE_ARGS=-DGGML_NATIVE=OFF",
    }
    return f"killed by {name}{advice.get(name, '')}"
