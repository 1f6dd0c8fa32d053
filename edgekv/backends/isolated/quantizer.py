"""Native quantization jobs in a process of their own, so that a crash there is an error message here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.isolated.child import Child
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
                "importance": str(stored) if importance else "",
                "keep": dict(keep),
                "waits": ready is not None,
            }
            self._run("quantize", job, progress, ready)

    def _run(self, action: str, job: dict[str, Any], progress: Progress, ready: Ready | None = None) -> None:
        with Child(
            "edgekv.backends.isolated.quantizer_child",
            os.fspath(self._model),
            str(self.n_threads),
            who="llama.cpp's process",
            out_of_memory="close other programs",
        ) as child:

            def hear(message: dict[str, Any]) -> None:
                if "wait" in message:
                    assert ready is not None
                    ready(message["wait"])
                    child.send({})
                else:
                    progress(message["done"], message["total"])

            child.ask(action, hear, **job)
