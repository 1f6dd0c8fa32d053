"""The child process of edgekv.backends.isolated.quantizer, which runs one native job.

Run as `python -m edgekv.backends.isolated.quantizer_child MODEL N_THREADS FOLDER`. The folder holds the job's
arrays in given.npz, and takes those that it finds in found.npz. Before its answer the child sends {"done": n,
"total": n} and, where a job waits, {"wait": tensor}, after which it goes on once it is sent an object.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from edgekv.backends.isolated.child import Parent
from edgekv.backends.isolated.quantizer import read_arrays
from edgekv.backends.llama_cpp.importance import measure_importance, sample_text
from edgekv.backends.llama_cpp.quantize import quantize_file


class Jobs:
    """Native jobs on one model file; each public method is one."""

    def __init__(self, parent: Parent, model: Path, n_threads: int, folder: Path) -> None:
        self._parent = parent
        self._model = model
        self._n_threads = n_threads
        self._given = read_arrays(folder / "given.npz")
        self._found = folder / "found.npz"

    def sample(self, length: int, seed: int) -> None:
        """Find token windows that continue prompts."""
        prompts = self._given["prompts"]
        windows = sample_text(self._model, prompts, length, seed, self._n_threads, self._progress)
        np.savez(self._found, windows=windows)

    def measure(self) -> None:
        """Find the importance matrix over token windows."""
        found = measure_importance(self._model, self._given["windows"], self._n_threads, self._progress)
        np.savez(self._found, **found)  # type: ignore[arg-type]

    def quantize(self, output: str, file_type: int, keep: dict[str, int], waits: bool) -> None:
        """Write the model, quantized."""
        ready = self._wait if waits else None
        source, threads = self._model, self._n_threads
        quantize_file(source, Path(output), file_type, self._given, keep, threads, self._progress, ready)

    def _progress(self, done: int, total: int, _: str = "") -> None:
        self._parent.send({"done": done, "total": total})

    def _wait(self, name: str) -> None:
        self._parent.send({"wait": name})
        if self._parent.receive() is None:
            os._exit(1)  # nobody writes the tensor any more


if __name__ == "__main__":
    parent = Parent()
    parent.serve(Jobs(parent, Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
