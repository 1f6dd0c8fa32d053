"""The Quantizer: llama.cpp's quantization in child processes, so that a native crash is an error here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.isolated.child import Child
from edgekv.files import temporary_folder
from edgekv.host.threads import default_threads
from edgekv.progress import Progress
from edgekv.source import Array

Ready = Callable[[str], None]  # returns once the tensor of that name is in the file


class Quantizer:
    """llama.cpp's quantization, importance matrix and sampling for one model file; one child process per job.

    The file must have passed edgekv.models.gguf.header: an unsound one may abort the child.

    Raises:
        BackendError: the engine is not installed, failed, or its process died.
    """

    def __init__(self, model: Path, n_threads: int | None = None) -> None:
        self._model = model
        self.n_threads = n_threads or default_threads()

    def sample(
        self, prompts: NDArray[np.int64], length: int, seed: int, progress: Progress
    ) -> NDArray[np.int64]:
        """Token windows (n, length) that the model writes after prompts (n, P), on one thread.

        Threads of one engine wait for each other at every step, for long where a core is busy: to use more cores, call
        this from several threads.
        """
        found = self._run("sample", {"prompts": prompts}, progress, n_threads=1, length=length, seed=seed)
        return found["windows"]

    def measure(self, windows: NDArray[np.int64], progress: Progress) -> dict[str, Array]:
        """E[x^2] of every weight's inputs over token windows (n, T), by tensor name."""
        return self._run("measure", {"windows": windows}, progress)

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
            ready: where the model's tensors are still being written, waits for the named one.

        Raises:
            OutputError: the disk is full.
        """
        job: dict[str, Any] = {
            "output": str(output),
            "file_type": file_type,
            "keep": dict(keep),
            "waits": ready is not None,
        }
        self._run("quantize", importance, progress, ready, **job)

    def _run(
        self,
        action: str,
        arrays: Mapping[str, NDArray[Any]],
        progress: Progress,
        ready: Ready | None = None,
        n_threads: int | None = None,
        **job: Any,
    ) -> dict[str, NDArray[Any]]:
        """Run a job of edgekv.backends.isolated.quantizer_child; the arrays that it found, by name."""
        module, remedy = "edgekv.backends.isolated.quantizer_child", "close other programs"
        with temporary_folder("edgekv-quantize-") as folder:
            np.savez(folder / "given.npz", **arrays)  # type: ignore[arg-type]
            arguments = os.fspath(self._model), str(n_threads or self.n_threads), str(folder)
            with Child(module, *arguments, who="llama.cpp's process", out_of_memory=remedy) as child:

                def hear(message: dict[str, Any]) -> None:
                    if "wait" in message:
                        assert ready is not None
                        ready(message["wait"])
                        child.send({})
                    else:
                        progress(message["done"], message["total"])

                child.ask(action, hear, **job)
            return read_arrays(folder / "found.npz")


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file by name; none if there is no such file."""
    if not path.exists():
        return {}
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}
