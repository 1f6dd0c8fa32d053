"""Refusal of a model that does not fit in free memory, before it is loaded.

llama.cpp fills its cache with zeros when it makes it, so a cache that does not fit ends in the OOM killer, which
may choose another program. Free memory is what Linux's /proc/meminfo and a container's cgroup say.
"""

from __future__ import annotations

from pathlib import Path

from edgekv.backends.llama_cpp.footprint import CELLS, footprint
from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.host.memory import available_nbytes
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.models.gguf.spec import spec_from_gguf
from edgekv.quant.formats import COMMON_CACHES
from edgekv.spec import ModelSpec

MIB = 2**20


def require_memory(
    path: Path, header: GGUFHeader, n_ctx: int, cache_type: str, n_ubatch: int, root: Path = Path("/")
) -> int | None:
    """Make sure that weights, cache and buffers fit; the bytes left beside them, None if that cannot be known.

    `root` holds proc and sys.

    Raises:
        InputError: they do not; says what would.
    """
    left = available_nbytes(root)
    shapes = {tensor.name: tensor.dims[::-1] for tensor in header.tensors}
    try:
        spec = spec_from_gguf(header.metadata, shapes, path)
    except (
        ModelFileError,
        UnsupportedError,
    ):  # llama.cpp runs more than EdgeKV knows, and refuses in its words
        return None
    weights = sum(tensor.nbytes for tensor in header.tensors)
    needed = _needed_nbytes(spec, weights, n_ctx, cache_type, n_ubatch)
    if left is None or needed is None:
        return None
    if needed <= left:
        return left - needed
    cache = spec.kv_bytes_per_token(cache_type) * n_ctx
    raise InputError(
        f"{path} with {n_ctx} tokens of {cache_type} cache needs about {needed / MIB:,.0f} MiB ({weights / MIB:,.0f} "
        f"of weights, {cache / MIB:,.0f} of cache) and {left / MIB:,.0f} MiB are left; "
        + _remedy(spec, weights, n_ctx, cache_type, n_ubatch, left)
    )


def _needed_nbytes(spec: ModelSpec, weights: int, n_ctx: int, cache_type: str, n_ubatch: int) -> int | None:
    """What loading adds to this process; None for a cache type that the model cannot have."""
    try:
        return footprint(spec, weights, cache_type, n_ctx, n_ubatch, runtime_nbytes=0).needed_nbytes
    except ValueError:
        return None


def _remedy(spec: ModelSpec, weights: int, n_ctx: int, cache_type: str, n_ubatch: int, left: int) -> str:
    remedies = []
    blocks, too_many = 0, -(-n_ctx // CELLS)
    while too_many - blocks > 1:  # the need grows with the context, so halving finds the edge
        middle = (blocks + too_many) // 2
        needed = _needed_nbytes(spec, weights, middle * CELLS, cache_type, n_ubatch)
        blocks, too_many = (middle, too_many) if needed is not None and needed <= left else (blocks, middle)
    if blocks:
        remedies.append(f"--ctx-size {blocks * CELLS}")
    now = spec.kv_bytes_per_token(cache_type)
    for narrower in COMMON_CACHES:
        needed = _needed_nbytes(spec, weights, n_ctx, narrower, n_ubatch)
        if needed is not None and needed <= left and spec.kv_bytes_per_token(narrower) < now:
            remedies.append(f"--cache-type {narrower}")
            break
    if not remedies:
        return "take a smaller model, end other programs, or add swap"
    return f"{' or '.join(remedies)} would fit, or end other programs"
