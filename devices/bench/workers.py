"""The bench's side of its worker processes: start, ask, and explain a death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from edgekv.errors import BackendError

DEATHS = {
    signal.SIGILL: "illegal instruction: this llama.cpp build uses CPU features that this CPU lacks; "
    "`edgekv doctor` says which",
    signal.SIGKILL: "killed, most likely by the kernel for want of memory; try a smaller context or model",
    signal.SIGSEGV: "crashed (segmentation fault)",
    signal.SIGABRT: "aborted",
    signal.SIGBUS: "bus error: the model file shrank or its disk failed while mapped",
}


class WorkerProcess:
    """One `edgekv.devices.bench.worker` process; a context manager that ends it."""

    def __init__(self, label: str) -> None:
        self.label = label
        # Closed in close(): it lives as long as the process that writes it.
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgekv.devices.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            BackendError: the worker refused, or died; the message says of what.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BackendError(f"{self.label}: {self._cause_of_death()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BackendError(f"{self.label}: {answer['error']}")
        return answer["ok"]

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code < 0:
            known = {int(number): text for number, text in DEATHS.items()}
            return (
                f"the engine's process was {known.get(-code, f'ended by signal {-code}')}{self._last_words()}"
            )
        return f"the engine's process left with code {code}{self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read()[-4000:].splitlines() if line.strip()]
        return f" (last line: {lines[-1][:300]})" if lines else ""

    def close(self) -> None:
        """End the process; no error if it is gone."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
