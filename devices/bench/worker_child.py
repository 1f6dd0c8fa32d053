"""Child process of edgekv.devices.bench.worker: one model, its speed and its memory."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from edgekv.backends.isolated.child import Parent
from edgekv.backends.open import Kind


class Worker:
    """Answers requests; each public method is one."""

    def __init__(self) -> None:
        self._backend: Any = None
        self._path = Path()
        self._tokens: list[int] = []

    def bandwidth(self, nbytes: int, threads: int, cpus: list[int]) -> float:
        """Read bandwidth of these CPUs in GB/s."""
        from edgekv.devices.bench.bandwidth import read_bandwidth_gb_s

        pin(cpus)
        return read_bandwidth_gb_s(nbytes, threads)

    def open(
        self,
        path: str,
        engine: Kind,
        n_ctx: int,
        cache_type: str,
        threads: int,
        cpus: list[int],
        eviction: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Load the model: seconds that it took, and bytes that the engine allocated."""
        from edgekv.backends.open import open_backend
        from edgekv.cache.policies.settings import Eviction
        from edgekv.documents import decode

        pin(cpus)
        self._path = Path(path)
        start = time.perf_counter()
        self._backend = open_backend(
            self._path,
            engine,
            n_ctx=n_ctx,
            cache_type=cache_type,
            n_threads=None if engine == "reference" else threads,
            eviction=decode(Eviction, eviction) if eviction else None,
        )
        load_s = time.perf_counter() - start
        self._tokens = _tokens(n_ctx, self._backend.n_vocab)
        return {
            "load_s": load_s,
            "kernel": self._backend.kernel,
            "cache_nbytes": self._backend.cache_nbytes(),
            "repacked_nbytes": self._repacked_nbytes(engine),
        }

    def card(self) -> int | None:
        """Bytes in use on the GPU, of all programs; None where the engine is built without one."""
        from edgekv.backends.llama_cpp.library import llama
        from edgekv.devices.sensors.nvml import first_card

        seen = first_card() if llama().llama_supports_gpu_offload() else None
        return seen.used_nbytes if seen else None

    def engine_features(self) -> list[str]:
        """CPU features that this llama.cpp build uses, as it names them."""
        from edgekv.backends.llama_cpp.library import llama

        return system_features(llama().llama_print_system_info().decode())

    def fill(self, depth: int) -> None:
        """Bring the cache to `depth` tokens, by running them anew where it cannot go back to them."""
        if self._backend.n_past > depth:
            self._backend.trim(depth)
        if self._backend.n_past < depth:
            self._backend.prefill(self._tokens[self._backend.n_past : depth])

    def prefill(self, n: int) -> float:
        """Seconds until the first answer token to `n` prompt tokens; the cache is brought back after."""
        depth = self._backend.n_past
        start = time.perf_counter()
        int(self._backend.prefill(self._tokens[depth : depth + n]).argmax())
        seconds = time.perf_counter() - start
        self.fill(depth)
        return seconds

    def decode(self, n: int) -> float:
        """Seconds to decode `n` tokens one at a time; the cache is brought back after."""
        depth = self._backend.n_past
        start = time.perf_counter()
        for token in self._tokens[depth : depth + n]:
            int(self._backend.decode(token).argmax())
        seconds = time.perf_counter() - start
        self.fill(depth)
        return seconds

    def runtime(self) -> int:
        """Resident bytes of this process with llama.cpp ready, before any model."""
        import edgekv.backends.llama_cpp.backend  # noqa: F401  # with NumPy and all else that any model needs
        from edgekv.backends.llama_cpp.library import llama
        from edgekv.devices.sensors.resident import ResidentSet

        llama().llama_backend_init()
        return ResidentSet.of_self(self._path).rss_nbytes

    def memory(self) -> dict[str, int]:
        """Resident set of this process and the model file's part of it, in bytes."""
        from edgekv.devices.sensors.resident import ResidentSet
        from edgekv.models.onnx.folder import DATA, is_onnx_folder

        seen = ResidentSet.of_self(self._path / DATA if is_onnx_folder(self._path) else self._path)
        return {"rss": seen.rss_nbytes, "peak": seen.peak_rss_nbytes, "file": seen.file_nbytes}

    def _repacked_nbytes(self, engine: Kind) -> int:
        """Weights held beside the mapped file: onnxruntime packs all of them its own way."""
        from edgekv.models.onnx.manifest import read_manifest

        if engine == "onnx":
            return read_manifest(self._path).model.weights_nbytes
        if engine != "llama.cpp":
            return 0
        from edgekv.backends.llama_cpp.library import LOG

        return repacked_nbytes(LOG.text())


def repacked_nbytes(log: str) -> int:
    """Weights that the engine holds in buffers of its own beside the mapped file, from its log.

    Repacked copies stay beside the mapped originals: "CPU_REPACK model buffer size =    95.34 MiB".
    """
    found = re.findall(r"(\S+) model buffer size =\s*([\d.]+) MiB", log)
    return round(sum(float(mib) for name, mib in found if not name.endswith("_Mapped")) * 2**20)


def system_features(info: str) -> list[str]:
    """Names set to 1 in llama_print_system_info's "CPU : AVX = 1 | NEON = 0 | ..."."""
    return re.findall(r"(\w+) = 1\b", info)


def pin(cpus: list[int]) -> None:
    """Keep this process on these CPUs, where the system can."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _tokens(count: int, n_vocab: int) -> list[int]:
    """A fixed sequence of token ids spread over the vocabulary; speed does not depend on their sense."""
    return [1 + (i * 2654435761 + 12345) % (n_vocab - 1) for i in range(count)]


if __name__ == "__main__":
    Parent().serve(Worker())
