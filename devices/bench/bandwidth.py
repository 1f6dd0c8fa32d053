"""Measured memory read bandwidth: the ceiling of decode speed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

MIN_NBYTES = 32 * 2**20
MAX_NBYTES = 1024 * 2**20


def working_set_nbytes(weights_nbytes: int, available_nbytes: int | None) -> int:
    """Bytes of the array to read: as many as the weights, but at most an eighth of the free memory.

    Reading as much as the model reads finds the level of the memory that really serves it: a model that
    fits a large last-level cache decodes from there and not from DRAM.
    """
    limit = MAX_NBYTES if available_nbytes is None else min(MAX_NBYTES, available_nbytes // 8)
    return max(MIN_NBYTES, min(weights_nbytes, limit))


def read_bandwidth_gb_s(nbytes: int, threads: int, seconds: float = 0.6) -> float:
    """Best of several passes in which `threads` threads read an array of `nbytes` together, in GB/s.

    NumPy's integer maximum is a vector loop that releases the GIL. The best pass is the figure, as in STREAM,
    since other programs can only slow a pass down.
    """
    import numpy as np

    array = np.ones(nbytes // 4, dtype=np.int32)
    parts = np.array_split(array, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        stop = time.perf_counter() + seconds
        passes = 0
        while passes < 5 or time.perf_counter() < stop:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, array.nbytes / (time.perf_counter() - start) / 1e9)
            passes += 1
    return best
