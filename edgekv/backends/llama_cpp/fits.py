"""Refusal of a model that does not fit in free memory, before it is loaded.

llama.cpp fills its cache with zeros when it allocates it, so a cache that does not fit calls the OOM killer,
which may choose another program. Free memory is read from /proc/meminfo and the container's cgroups.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from edgekv.backends.llama_cpp.footprint import CELLS, cache_nbytes, footprint
from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.host.memory import available_nbytes
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.models.gguf.spec import spec_from_gguf
from edgekv.quant.formats import COMMON_CACHES
from edgekv.spec import ModelSpec

MIB = 2**20


def require_memory(
    path: Path,
    header: GGUFHeader,
    n_ctx: int,
    cache_type: str,
    n_ubatch: int,
    root: Path = Path("/"),
    n_sequences: int = 1,
    keeps_all: bool = False,
) -> int | None:
    """Bytes that are left beside weights, cache and buffers; None if free memory or the need is unknown.

    Args:
        n_ctx: cells of the whole cache, which `n_sequences` share.
        keeps_all: layers with a window keep the whole context.

    Raises:
        InputError: the model does not fit; the message names what would.
    """
    left = available_nbytes(root)
    shapes = {tensor.name: tensor.dims[::-1] for tensor in header.tensors}
    weights = sum(tensor.nbytes for tensor in header.tensors)
    try:
        spec = spec_from_gguf(header.metadata, shapes, path)
        cache = cache_nbytes(spec, cache_type, n_ctx, n_ubatch, keeps_all)
    except (ModelFileError, UnsupportedError, ValueError):
        return None  # an architecture that only llama.cpp knows, or a cache type that llama.cpp will refuse

    def needed_nbytes(n_ctx: int, cache_type: str) -> int:
        parts = footprint(spec, weights, cache_type, n_ctx, n_ubatch, runtime_nbytes=0, keeps_all=keeps_all)
        return parts.needed_nbytes

    needed = needed_nbytes(n_ctx, cache_type)
    if left is None:
        return None
    if needed <= left:
        return left - needed
    raise InputError(
        f"{path} with {n_ctx} tokens of {cache_type} cache needs about {needed / MIB:,.0f} MiB ({weights / MIB:,.0f} "
        f"of weights, {cache / MIB:,.0f} of cache) and {left / MIB:,.0f} MiB are left; "
        + _remedy(needed_nbytes, spec, n_ctx, cache_type, left, n_sequences)
    )


def _remedy(
    needed_nbytes: Callable[[int, str], int],
    spec: ModelSpec,
    n_ctx: int,
    cache_type: str,
    left: int,
    n_sequences: int,
) -> str:
    """The largest context and the widest cache type that would fit in `left` bytes, as options."""
    remedies = []
    smaller = range(CELLS, n_ctx, CELLS)
    if fitting := bisect_right(smaller, left, key=lambda cells: needed_nbytes(cells, cache_type)):
        remedies.append(f"--ctx-size {smaller[fitting - 1] // n_sequences}")
    now = spec.kv_bytes_per_token(cache_type)
    for narrower in COMMON_CACHES:
        with contextlib.suppress(ValueError):  # rows that are no multiple of the type's block
            if spec.kv_bytes_per_token(narrower) < now and needed_nbytes(n_ctx, narrower) <= left:
                remedies.append(f"--cache-type {narrower}")
                break
    if not remedies:
        return "take a smaller model, end other programs, or add swap"
    return f"{' or '.join(remedies)} would fit, or end other programs"
