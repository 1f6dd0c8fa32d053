"""Speed with EdgeKV's attention kernel: each cached row is read once for all heads and several tokens.

Per layer and cached token the kernel spends the FLOPs of attention, and cycles to read and unpack the row's values,
which depend on the cache type and are shared by the tokens of a block. The coefficients in kernel.json are fitted on
runs of one x86 machine by `benchmarks/plan/kernel_fit.py`; for ARM they are instructions that emulated cores executed,
at an assumed rate per cycle (`benchmarks/kernel/instructions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from edgekv.devices.boards.profile import Board
from edgekv.devices.predict.speed import Coefficients, Workload, bytes_per_s, prefill_weights_s, weights_s
from edgekv.documents import Document, decode, parse
from edgekv.quant.cache_format import CacheFormat
from edgekv.quant.formats import UNQUANTIZED

COEFFICIENTS = Path(__file__).with_name("kernel.json")
BLOCK = 72  # rows of queries, heads times tokens, that read a cached row together (attention.cpp)


class KernelCoefficients(Document, frozen=True):
    """How fast a core of one kind of machine computes attention with the kernel.

    Attributes:
        flops_per_cycle: by the kind of attention, "gqa" or "mla".
        cycles_per_value: to read and unpack a cached value, by cache type; "quantized" for types without an entry.
        source: where they come from.
    """

    flops_per_cycle: Mapping[str, float]
    cycles_per_value: Mapping[str, float]
    source: str

    def cycles(self, cache_type: str) -> float:
        """Cycles per cached value, the mean of keys and values."""
        cache = CacheFormat.parse(cache_type)
        found = self.cycles_per_value
        names = [f16_or_name(kind.name) for kind in (cache.k, cache.v)]
        return sum(found.get(name, found["quantized"]) for name in names) / 2


def f16_or_name(cache_type: str) -> str:
    """f16 for whatever is not quantized: it is read as quickly."""
    return "f16" if cache_type in UNQUANTIZED else cache_type


@cache
def load_kernel_coefficients() -> dict[str, KernelCoefficients]:
    """The coefficients by kind of machine; GPUs do not run the kernel."""
    return decode(dict[str, KernelCoefficients], parse(COEFFICIENTS.read_bytes()))


def kernel_decode_s(
    work: Workload, board: Board, threads: int, depth: float, c: Coefficients
) -> float | None:
    """Seconds of one decoded token with `depth` tokens in the cache; None where the kernel does not run."""
    row_s = cached_row_s(work, board, threads, 1)
    if row_s is None:
        return None
    traffic_s = work.cache_nbytes / bytes_per_s(board, threads, c)
    return weights_s(work, board, threads, c) + depth * max(row_s, traffic_s)


def kernel_prefill_s(
    work: Workload, board: Board, threads: int, n: int, depth: float, c: Coefficients
) -> float | None:
    """Seconds to prefill `n` tokens after `depth` ones; None where the kernel does not run."""
    row_s, weights = cached_row_s(work, board, threads, n), prefill_weights_s(work, board, threads, c)
    if row_s is None or weights is None:
        return None
    return n * (weights + (depth + n / 2) * row_s)


def cached_row_s(work: Workload, board: Board, threads: int, n: int) -> float | None:
    """What one cached token adds to the time of each of `n` tokens that run together."""
    k = load_kernel_coefficients().get(board.kind)
    if k is None:
        return None
    flops = work.attention_flops / k.flops_per_cycle["mla" if work.latent else "gqa"]
    cycles = flops + work.cache_values * k.cycles(work.cache_type) / shared_by(n, work.group)
    return cycles / (threads * board.clock_ghz * 1e9)


def shared_by(n: int, group: int) -> float:
    """How many of `n` tokens read a cached row together."""
    return min(n, max(1.0, BLOCK / group))
