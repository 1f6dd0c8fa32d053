"""Cached rows of latents moved to other positions: their rope keys are turned, everything else stays.

A latent knows no position. The rope key of P values at position m is R(m) k, so R(d) makes it that of position m + d:
one complex product per pair (Irminsul, arXiv 2605.05696).
"""

from __future__ import annotations

import numpy as np

from edgekv.cache.rows import Bytes, CacheRows, Layout, Plane, exact_values
from edgekv.errors import UnsupportedError
from edgekv.models.identity import ModelIdentity
from edgekv.quant.formats import FORMATS
from edgekv.reference.ops import inverse_frequencies
from edgekv.source import Array
from edgekv.spec import RopeSpec

MOVABLE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # what gguf-py can round to


def require_movable(model: ModelIdentity, layout: Layout) -> None:
    """Raise UnsupportedError unless cached rows of a model can be moved."""
    if not model.is_latent:
        raise UnsupportedError(
            f"{model.name} caches keys and values, whose rows belong to their positions; use one pack alone, or "
            "convert the model first: edgekv convert"
        )
    widths = [rank + rope.dim for rank, rope in zip(model.ranks, model.ropes, strict=True)]
    if [plane.values for plane in layout] != widths:
        raise UnsupportedError(
            f"{model.name}: this engine's rows are not its plain latents and cannot be moved; use one pack alone, or "
            "llama.cpp"
        )
    for plane in layout:
        if plane.cache_type not in MOVABLE or plane.encoding:
            raise UnsupportedError(
                f"rows of {plane.cache_type} cannot be moved; make packs with --cache-type q4_0, or another of "
                + ", ".join(MOVABLE)
            )


def moved(rows: CacheRows, model: ModelIdentity, distance: int) -> CacheRows:
    """A copy of rows at positions that are `distance` higher.

    In a quantized type the blocks of the rope key are rounded once more, the latent's keep their bytes.

    Raises:
        UnsupportedError: as `require_movable` does.
    """
    require_movable(model, rows.layout)
    out = CacheRows(rows.layout, rows.n_tokens, rows.data.copy())
    if distance and rows.n_tokens:
        for plane, array, rank, rope in zip(rows.layout, out.planes(), model.ranks, model.ropes, strict=True):
            form = FORMATS[plane.cache_type]
            keys = array[:, form.nbytes(rank) :]
            keys[:] = _rounded(turned(exact_values(keys, plane), rope, distance), plane)
    return out


def turned(keys: Array, rope: RopeSpec, distance: int) -> Array:
    """Rope keys (n, P) turned by a distance; the magnitude that a spec multiplies them by is in them already."""
    angles = distance * inverse_frequencies(
        rope
    )  # float64: a distance of thousands leaves float32 few digits
    turn = np.exp(1j * angles).astype(np.complex64)
    first, second = (
        (keys[:, 0::2], keys[:, 1::2]) if rope.layout == "interleaved" else np.split(keys, 2, axis=1)
    )
    pairs = (first + 1j * second) * turn
    parts = (pairs.real, pairs.imag)
    whole = np.stack(parts, -1).reshape(keys.shape) if rope.layout == "interleaved" else np.hstack(parts)
    return np.asarray(whole, np.float32)


def _rounded(values: Array, plane: Plane) -> Bytes:
    import gguf

    rounded = gguf.quants.quantize(values, gguf.GGMLQuantizationType[plane.cache_type.upper()])
    return np.ascontiguousarray(rounded).view(np.uint8).reshape(len(values), -1)
