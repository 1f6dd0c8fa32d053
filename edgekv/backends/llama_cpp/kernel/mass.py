"""The attention that cached rows get, as the kernel collects it: what eviction wants and flash attention hides."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p

import numpy as np

from edgekv.backends.llama_cpp.kernel.ggml import ggml


class AttentionMass:
    """Softmax weights by layer and cell of the cache, summed over heads and tokens, while `collecting`.

    Attributes:
        rows: (layers, cells) float32.
    """

    def __init__(self, n_layers: int, n_cells: int) -> None:
        self.rows = np.zeros((n_layers, n_cells), np.float32)
        kernel = ggml("ggml_backend_reg_by_name")(b"EdgeKV")
        address = ggml("ggml_backend_reg_get_proc_address")(kernel, b"edgekv_collect_mass")
        self._collect = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int64)(address)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what llama.cpp computes on this thread."""
        self._collect(self.rows.ctypes.data, *self.rows.shape)
        try:
            yield
        finally:
            self._collect(None, 0, 0)
