"""Speed of a model on a board: bytes over bandwidth, FLOPs over clock, and a few fitted coefficients.

A decoded token costs
    max(weight bytes / bandwidth, weight FLOPs / compute) + layers x fixed time
    + cached tokens x max(cache bytes / bandwidth, attention FLOPs / compute)
and a prefilled one weight FLOPs / compute + mean cached tokens x attention FLOPs / compute. On CPUs
attention over a cache is compute and not traffic: bytes alone predict 80 % of the speed at depth 8192 where
39 % is measured. The coefficients, fitted by `benchmarks/plan/fit.py` on public measurements, lie in speed.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgekv.devices.boards.profile import Board
from edgekv.documents import Document, decode, parse
from edgekv.quant.cache_format import CacheFormat
from edgekv.quant.formats import UNQUANTIZED

COEFFICIENTS = Path(__file__).with_name("speed.json")


class Coefficients(Document, frozen=True):
    """How one kind of machine turns bandwidth and clock into tokens.

    `bandwidth_share` of the board's read bandwidth reaches the kernels; each layer costs `layer_s` however
    small it is; a core does `decode_flops_per_cycle`, of 2- and 3-bit weights `low_bit_cost` times fewer
    (on a GPU these weights cost that much more time); decoding attention does `attention_flops_per_cycle` per core by
    the kind of attention and of cache (on a GPU it reads the cache `attention_passes` times); prefill does
    `prefill_flops_per_cycle` per core by weight family, and attention in it runs at `prefill_attention_share` of
    the weights' rate, `quantized_prefill_cost` times slower on a quantized cache. Zero: not used.
    `assumed` names the coefficients that no public figure backs.
    """

    bandwidth_share: float
    layer_s: float
    decode_flops_per_cycle: float
    low_bit_cost: float
    attention_flops_per_cycle: Mapping[str, float]
    attention_passes: float
    prefill_flops_per_cycle: Mapping[str, float]
    prefill_attention_share: float
    quantized_prefill_cost: float
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Workload:
    """FLOPs and bytes per token of one model with one cache type."""

    n_layers: int
    weight_flops: float
    read_nbytes: float
    weights: str  # GGML type that holds the most bytes
    cache_nbytes: float  # per cached token, all layers
    attention_flops: float  # per cached token, all layers
    cache_type: str = "f16"
    cache_values: float = 0.0  # per cached token, all layers
    group: int = 1  # query heads that share a cached row
    latent: bool = False  # MLA

    @property
    def quantized_cache(self) -> bool:
        """Whether K, V or both are quantized."""
        return CacheFormat.parse(self.cache_type).quantized

    @property
    def attention(self) -> str:
        """Which attention kernel decodes it: a key of `attention_flops_per_cycle`."""
        return f"{'mla' if self.latent else 'gqa'} {'quantized' if self.quantized_cache else 'f16'}"


@cache
def load_coefficients() -> dict[str, Coefficients]:
    """The fitted coefficients by kind of machine."""
    return decode(dict[str, Coefficients], parse(COEFFICIENTS.read_bytes()))


def weight_family(weights: str) -> str:
    """The kernels that a weight type runs on: f16, q8, q4 (blocks of 32), k (K-quants) or low (2, 3 bit)."""
    first = weights.split("+")[0].upper().removeprefix("UD-")
    if first.lower() in UNQUANTIZED:
        return "f16"
    if first.startswith(("Q2", "Q3", "IQ1", "IQ2", "IQ3", "TQ")):
        return "low"
    if first.startswith("Q8"):
        return "q8"
    return "k" if "_K" in first else "q4"


def decode_s(work: Workload, board: Board, threads: int, depth: float, c: Coefficients) -> float:
    """Seconds of one decoded token with `depth` tokens in the cache."""
    return weights_s(work, board, threads, c) + depth * cached_token_s(work, board, threads, c)


def weights_s(work: Workload, board: Board, threads: int, c: Coefficients) -> float:
    """The part of a decoded token that does not depend on the cache."""
    cost = c.low_bit_cost if weight_family(work.weights) == "low" else 1.0
    traffic_s = work.read_nbytes / bytes_per_s(board, threads, c)
    fixed_s = work.n_layers * c.layer_s
    if board.is_gpu:
        return traffic_s * cost + fixed_s
    rate = _flops_per_s(board, threads, c.decode_flops_per_cycle)
    return max(traffic_s, work.weight_flops * cost / rate) + fixed_s


def cached_token_s(work: Workload, board: Board, threads: int, c: Coefficients) -> float:
    """What one token in the cache adds to the time of a decoded token."""
    traffic_s = work.cache_nbytes / bytes_per_s(board, threads, c)
    if board.is_gpu:
        return traffic_s * c.attention_passes
    rate = _flops_per_s(board, threads, c.attention_flops_per_cycle[work.attention])
    return max(traffic_s, work.attention_flops / rate)


def prefill_s(
    work: Workload, board: Board, threads: int, n: int, depth: float, c: Coefficients
) -> float | None:
    """Seconds to prefill `n` tokens after `depth` ones; None for a GPU whose prefill rate is not known."""
    rate = _prefill_flops_per_s(work, board, threads, c)
    if not rate:
        return None
    cost = c.quantized_prefill_cost if work.quantized_cache else 1.0
    attention_s = (depth + n / 2) * work.attention_flops * cost / (rate * c.prefill_attention_share)
    return n * (work.weight_flops / rate + attention_s)


def prefill_weights_s(work: Workload, board: Board, threads: int, c: Coefficients) -> float | None:
    """The part of a prefilled token that does not depend on the cache; None where the rate is not known."""
    rate = _prefill_flops_per_s(work, board, threads, c)
    return work.weight_flops / rate if rate else None


def _prefill_flops_per_s(work: Workload, board: Board, threads: int, c: Coefficients) -> float:
    if board.is_gpu:
        return (board.prefill_gflops or 0.0) * 1e9
    return _flops_per_s(board, threads, c.prefill_flops_per_cycle[weight_family(work.weights)])


def bytes_per_s(board: Board, threads: int, c: Coefficients) -> float:
    """Bytes that `threads` read together."""
    return board.bandwidth_gb_s(threads) * 1e9 * c.bandwidth_share


def _flops_per_s(board: Board, threads: int, flops_per_cycle: float) -> float:
    return threads * board.clock_ghz * 1e9 * flops_per_cycle
