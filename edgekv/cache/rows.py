"""Cached rows as bytes, in one layout for every engine: what sessions and packs hold, and what engines exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.documents import Document
from edgekv.quant.formats import FORMATS
from edgekv.source import Array

Bytes = NDArray[np.uint8]


class Plane(Document, frozen=True):
    """One array of a cache, with a row of `values` values per token.

    A layer of MLA has one, `<layer>.key`: the latent, then the rope key. A layer of GQA has `<layer>.key` and
    `<layer>.value`, each with all heads of a token side by side.

    Attributes:
        cache_type: the number format, a key of edgekv.quant.formats.FORMATS.
        encoding: what else was done to the values: "hadamard" where llama.cpp rotated each head before it rounded,
            "offset" for 8-bit codes with the zero point 128.
    """

    name: str
    cache_type: str
    values: int
    encoding: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return FORMATS[self.cache_type].nbytes(self.values)


Layout = tuple[Plane, ...]


def row_nbytes(layout: Layout) -> int:
    """Bytes of one token in all planes."""
    return sum(plane.nbytes for plane in layout)


def cache_type_of(layout: Layout) -> str:
    """The cache type of a layout as options spell it, such as "q8_0", or "q8_0/q4_0" for keys and values."""
    kinds = dict.fromkeys(plane.cache_type for kind in ("key", "value") for plane in layout
                          if plane.name.endswith(f".{kind}"))  # fmt: skip
    return "/".join(kinds)


def exact_values(stored: Bytes, plane: Plane) -> Array:
    """Stored rows (n, bytes) as float32 (n, values), rotated still where the plane's encoding says so."""
    import gguf  # a minimal installation of an engine of its own does without

    values = gguf.quants.dequantize(
        np.ascontiguousarray(stored), gguf.GGMLQuantizationType[plane.cache_type.upper()]
    )
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class CacheRows:
    """The cached rows of consecutive tokens.

    Attributes:
        data: the bytes, flat: plane after plane, each (n_tokens, plane.nbytes).
    """

    layout: Layout
    n_tokens: int
    data: Bytes

    @classmethod
    def empty(cls, layout: Layout, n_tokens: int) -> CacheRows:
        """Rows to be filled in."""
        return cls(layout, n_tokens, np.empty(n_tokens * row_nbytes(layout), np.uint8))

    @classmethod
    def join(cls, layout: Layout, parts: Sequence[CacheRows]) -> CacheRows:
        """The rows of all parts, one after the other."""
        joined = cls.empty(layout, sum(part.n_tokens for part in parts))
        start = 0
        for part in parts:
            assert part.layout == layout
            for target, rows in zip(joined.planes(), part.planes(), strict=True):
                target[start : start + part.n_tokens] = rows
            start += part.n_tokens
        return joined

    def planes(self) -> list[Bytes]:
        """A view (n_tokens, plane.nbytes) of each plane."""
        views, start = [], 0
        for plane in self.layout:
            stop = start + self.n_tokens * plane.nbytes
            views.append(self.data[start:stop].reshape(self.n_tokens, plane.nbytes))
            start = stop
        assert start == len(self.data), (start, len(self.data))
        return views

    def part(self, start: int, stop: int) -> CacheRows:
        """A copy of the rows of tokens `start` to `stop`."""
        cut = CacheRows.empty(self.layout, stop - start)
        for target, rows in zip(cut.planes(), self.planes(), strict=True):
            target[:] = rows[start:stop]
        return cut
