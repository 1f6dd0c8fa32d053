"""Native quantization jobs in a process of their own, so that a crash there is an error message here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgekv import errors
from edgekv.errors import BackendError
from edgekv.host.threads import default_threads
from edgekv.progress import Progress
from edgekv.source import Array

Ready = Callable[[str], None]  # returns when the tensor of that name is in the file


class Quantizer:
    """llama.cpp's quantization, importance matrix and sampling for one model file, each in a child process.

    The file must have passed edgekv.models.gguf.header: what is unsound may abort the child.

    Raises:
        BackendError: the engine is not installed, failed, or its process died.
    """

    def __init__(self, model: Path, n_threads: int | None = None) -> None:
        self._model = model
        self.n_threads = n_threads or default_threads()

    def sample(
        self, prompts: NDArray[np.int64], length: int, seed: int, progress: Progress
    ) -> NDArray[np.int64]:
        """Token windows (n, length) that the model writes after prompts (n, P)."""
        with tempfile.TemporaryDirectory(prefix="edgekv-quantize-") as folder:
            given, windows = Path(folder, "prompts.npy"), Path(folder, "windows.npy")
            np.save(given, prompts)
            paths = {"prompts": str(given), "windows": str(windows)}
            self._run("sample", {**paths, "length": length, "seed": seed}, progress)
            return np.asarray(np.load(windows), np.int64)

    def measure(self, windows: NDArray[np.int64], progress: Progress) -> dict[str, Array]:
        """E[x^2] of every weight's inputs over token windows (n, T), by tensor name."""
        with tempfile.TemporaryDirectory(prefix="edgekv-quantize-") as folder:
            given, found = Path(folder, "windows.npy"), Path(folder, "importance.npz")
            np.save(given, windows)
            self._run("measure", {"windows": str(given), "importance": str(found)}, progress)
            with np.load(found) as stored:
                return {name: np.asarray(stored[name], np.float32) for name in stored.files}

    def quantize(
        self,
        output: Path,
        file_type: int,
        importance: Mapping[str, Array],
        keep: Mapping[str, int],
        progress: Progress,
        ready: Ready | None = None,
    ) -> None:
        """Write `output`, quantized; see edgekv.backends.llama_cpp.quantize.quantize_file.

        Args:
            ready: where the model's tensors are still being written, waits for the one that comes next.

        Raises:
            OutputError: the disk is full.
        """
        with tempfile.TemporaryDirectory(prefix="edgekv-quantize-") as folder:
            stored = Path(folder, "importance.npz")
            if importance:
                np.savez(stored, **importance)  # type: ignore[arg-type]
            job = {
                "output": str(output),
                "file_type": file_type,
                "keep": dict(keep),
                "waits": ready is not None,
            }
            job["importance"] = str(stored) if importance else ""
            self._run("quantize", job, progress, ready)

    def _run(self, action: str, job: dict[str, Any], progress: Progress, ready: Ready | None = None) -> None:
        job |= {"action": action, "model": os.fspath(self._model), "n_threads": self.n_threads}
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                # -P: a folder named edgekv in the current directory must not shadow the installed one.
                [sys.executable, "-P", "-m", "edgekv.backends.isolated.quantizer_child", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C is for the parent, which ends the child
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # ggml's abort would run gdb on it for seconds
            )
            try:
                _follow(process, output, progress, ready)
            finally:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    stream.close()


def _follow(
    process: subprocess.Popen[bytes], output: IO[bytes], progress: Progress, ready: Ready | None
) -> None:
    """Read lines until the job ends; raise what it tells."""
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if "wait" in message:
            assert ready is not None
            ready(message["wait"])
            with contextlib.suppress(BrokenPipeError):  # it died meanwhile: told below
                os.write(process.stdin.fileno(), b"\n")
            continue
        if "error" in message:
            kind, text = message["error"]
            raise getattr(errors, kind)(text)
        if "ok" in message:
            return
        progress(message["done"], message["total"])
    code = process.wait()
    output.seek(0)
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines()]
    last = "; ".join([line for line in lines if line][-2:])
    raise BackendError(f"llama.cpp's process died: {_meaning(code)}" + (f" [{last}]" if last else ""))


def _meaning(code: int) -> str:
    if code >= 0:
        return f"it left with exit code {code}"
    name = signal.Signals(-code).name
    advice = {
        "SIGKILL": "; if memory ran out, close other programs",
        "SIGILL": ": llama-cpp-python was compiled for another CPU; reinstall it on this one",
    }
    return f"killed by {name}{advice.get(name, '; please report the model')}"
