"""The child process of edgekv.backends.isolated.quantizer: one native job.

Run as `python -m edgekv.backends.isolated.quantizer_child MODEL N_THREADS`. Before its answer it sends
{"done": n, "total": n} and, where a job waits, {"wait": tensor}: it goes on when it is sent an object.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from edgekv.backends.isolated.child import Parent
from edgekv.backends.llama_cpp.importance import measure_importance, sample_text
from edgekv.backends.llama_cpp.quantize import quantize_file


class Jobs:
    """Native jobs on one model file; each public method is one. Arrays come and go in files of NumPy's."""

    def __init__(self, parent: Parent, model: Path, n_threads: int) -> None:
        self._parent = parent
        self._model = model
        self._n_threads = n_threads

    def sample(self, prompts: str, windows: str, length: int, seed: int) -> None:
        """Write token windows that continue prompts."""
        given = np.load(prompts)
        np.save(windows, sample_text(self._model, given, length, seed, self._n_threads, self._progress))

    def measure(self, windows: str, importance: str) -> None:
        """Write the importance matrix over token windows."""
        found = measure_importance(self._model, np.load(windows), self._n_threads, self._progress)
        np.savez(importance, **found)  # type: ignore[arg-type]

    def quantize(
        self, output: str, file_type: int, importance: str, keep: dict[str, int], waits: bool
    ) -> None:
        """Write the model, quantized."""
        held = {}
        if importance:
            with np.load(importance) as stored:
                held = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
        quantize_file(
            self._model,
            Path(output),
            file_type,
            held,
            keep,
            self._n_threads,
            self._progress,
            self._wait if waits else None,
        )

    def _progress(self, done: int, total: int, _: str = "") -> None:
        self._parent.send({"done": done, "total": total})

    def _wait(self, name: str) -> None:
        self._parent.send({"wait": name})
        if self._parent.receive() is None:
            os._exit(1)  # nobody writes the tensor any more


if __name__ == "__main__":
    parent = Parent()
    parent.serve(Jobs(parent, Path(sys.argv[1]), int(sys.argv[2])))
