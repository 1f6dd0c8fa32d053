"""Child processes for native code: launch, requests in lines of JSON, and the cause of death.

The parent sends {"do": name, **arguments}. The child may send other objects before it answers {"ok": value}
or {"error": [class, message]}. A crash of native code ends only the child and is a BackendError in the parent.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from edgekv.errors import BackendError, from_wire, to_wire
from edgekv.files import unnamed_file

# How often a thread looks before it sleeps at one of ggml's barriers (libgomp's GOMP_SPINCOUNT). Its own 300,000 keep
# a core from the very thread that is waited for, wherever another program runs: beside one, decoding fell to 3 % of its
# speed, with 1,000 to 36 %; alone it was as fast (benchmarks/busy, x86). There a look pauses; on ARM it does not, so
# that it takes more of them to wait about as long.
SPINS = 20_000 if os.uname().machine == "aarch64" else 1000
OUTPUT_NBYTES = 2000  # bytes read of the end of a dead child's output
_SIGNALS = {int(number): number.name for number in signal.Signals}
_ADVICE = {
    "SIGILL": ", an illegal instruction: llama-cpp-python was compiled for another CPU; reinstall it on this one, "
    "or with CMAKE_ARGS=-DGGML_NATIVE=OFF (`edgekv doctor` says which instruction)",
    "SIGBUS": "; the model file shrank or its disk failed while it was mapped",
    **dict.fromkeys(("SIGSEGV", "SIGABRT", "SIGFPE"), "; please report the model"),
}


def _environment() -> dict[str, str]:
    """The parent's variables, and those that suit native code; what the user set stays."""
    # Python's own allocator would keep 3 MiB that reading a vocabulary took.
    chosen = {"PYTHONMALLOC": "malloc"}
    if "OMP_WAIT_POLICY" not in os.environ:
        chosen["GOMP_SPINCOUNT"] = str(SPINS)
    # ggml's abort would run gdb on the child for seconds.
    return {**chosen, **os.environ, "GGML_NO_BACKTRACE": "1"}


def cause_of_death(who: str, code: int, out_of_memory: str, output: str = "") -> str:
    """Why a process ended, in one line.

    Args:
        who: a name for the process, such as "the engine's process".
        code: its exit code, negative for a signal.
        out_of_memory: the remedy if the OOM killer ended it.
        output: its output, of which the last two lines are quoted.
    """
    if code >= 0:
        how = f"exit code {code}"
    else:
        name = _SIGNALS.get(-code, f"signal {-code}")
        advice = f"; if memory ran out, {out_of_memory}" if name == "SIGKILL" else _ADVICE.get(name, "")
        how = f"killed by {name}{advice}"
    last = "; ".join([line.strip() for line in output.splitlines() if line.strip()][-2:])
    return f"{who} died: {how}" + (f" [{last}]" if last else "")


class Child:
    """A Python module that runs in a process of its own; a context manager that ends it.

    Ctrl-C at a terminal reaches the parent alone, which then ends or interrupts the child.

    Args:
        module: run as `python -m module *arguments`; it calls `Parent.serve`.
        who: a name for the process in errors.
        out_of_memory: the remedy if the OOM killer ends it.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        out_of_memory: str,
        who: str = "the engine's process",
        pass_fds: Collection[int] = (),
    ) -> None:
        import subprocess  # which the children, who import this module too, do without

        self._who, self._out_of_memory = who, out_of_memory
        self._closed = False
        self._output = os.fdopen(unnamed_file("edgekv-output"), "w+b")
        self._process = subprocess.Popen(
            # -P: a folder named edgekv in the current directory must not shadow the installed one.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            pass_fds=pass_fds,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
            env=_environment(),
        )

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(
        self, do: str, on_message: Callable[[dict[str, Any]], None] | None = None, /, **arguments: Any
    ) -> Any:
        """The answer to a request; `on_message` is called with each object that the child sends before it.

        An exception while waiting ends the child: its late answer would be taken for the next one.

        Raises:
            EdgeKVError: the child's error, with its class.
            BackendError: the child died, or was closed.
        """
        if self._closed:
            raise BackendError(f"{self._who} is closed")
        try:
            self.send({"do": do, **arguments})
            while (message := self.receive()) and message.keys().isdisjoint(("ok", "error")):
                assert on_message is not None, message
                on_message(message)
        except BaseException:
            self.close()
            raise
        if not message:
            raise BackendError(self.cause_of_death())
        if "error" in message:
            raise from_wire(*message["error"])
        return message["ok"]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send an object; if the child is gone, `ask` notices it when it reads the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(_line(message))
            self._process.stdin.flush()

    def wait(self) -> None:
        """Wait until the process has ended by itself."""
        self._process.wait()

    def close(self) -> None:
        """End the process, if it is still running."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._output):
            with contextlib.suppress(BrokenPipeError):  # the child did not read all of its input
                stream.close()  # type: ignore[union-attr]

    def receive(self) -> dict[str, Any] | None:
        """The next object that the child sends by itself; None once it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def cause_of_death(self) -> str:
        """Why the process ended, which it has to have begun to do."""
        code = self._process.wait()
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - OUTPUT_NBYTES))
        return cause_of_death(
            self._who, code, self._out_of_memory, self._output.read().decode("utf-8", "replace")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Parent:
    """The parent, reached by the child's standard input and output.

    Output of native code goes to standard error, not between the lines of JSON. Once the parent is gone, killed or
    not, this process ends too, whatever native code is at.
    """

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        _thread.start_new_thread(_end_with_parent, ())

    def send(self, message: Mapping[str, Any]) -> None:
        """Send an object; ends this process if the parent is gone, as native code would lose an exception."""
        try:
            self._lines.write(_line(message))
            self._lines.flush()
        except BrokenPipeError:
            os._exit(1)

    def receive(self) -> dict[str, Any] | None:
        """The next object; None once the parent is gone."""
        line = sys.stdin.buffer.readline()
        return json.loads(line) if line else None

    def serve(self, actions: object) -> None:
        """Answer requests until the parent is gone, each by the method of `actions` with its name."""
        while (request := self.receive()) is not None:
            try:
                answer = {"ok": getattr(actions, request.pop("do"))(**request)}
            except Exception as error:
                answer = {"error": to_wire(error)}
            self.send(answer)


def _end_with_parent() -> None:
    """Wait for the end of standard input, which stays open as long as the parent lives, and leave."""
    ended = select.poll()
    ended.register(0, 0)  # a hang-up is told in any case
    ended.poll()
    os._exit(1)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
