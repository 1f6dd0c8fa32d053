"""Number formats of a KV cache: one for keys and values, or one for each, as llama.cpp allows.

Standard library only. Source, in llama.cpp: src/llama-context.cpp (llama_init_from_model) refuses what is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.quant.formats import CACHE_TYPES, FORMATS, Format


@dataclass(frozen=True)
class CacheFormat:
    """What a cache type such as "q8_0", or "q8_0/q4_0" for keys and values, stands for."""

    k: Format
    v: Format

    @classmethod
    def parse(cls, text: str) -> CacheFormat:
        """The formats that a cache type names.

        Raises:
            ValueError: it is neither one of CACHE_TYPES nor two of them with a slash between.
        """
        names = text.split("/")
        for name in names:
            if name not in CACHE_TYPES or len(names) > 2:
                raise ValueError(
                    f"unknown cache type {text if len(names) > 2 else name!r}; known: {', '.join(CACHE_TYPES)}, "
                    "and two of them for K and V, as in q8_0/q4_0"
                )
        return cls(FORMATS[names[0]], FORMATS[names[-1]])

    def __str__(self) -> str:
        """The cache type; one name where both are the same."""
        return "/".join(dict.fromkeys((self.k.name, self.v.name)))

    @property
    def quantized(self) -> bool:
        """Whether keys or values are stored in blocks with scales of their own."""
        return self.k.block > 1 or self.v.block > 1

    @property
    def cpu_only(self) -> str:
        """A side's format that llama.cpp keeps in no GPU's memory; "" without one."""
        return next((side.name for side in (self.k, self.v) if side.cpu_cache), "")

    def kv_nbytes(self, n_heads: int, width_k: int, width_v: int) -> int:
        """Bytes of one token in one layer: `n_heads` rows of keys and as many of values.

        Raises:
            ValueError: a side's blocks do not divide the width of its heads; the message names the side.
        """
        self._check(width_k, width_v)
        return n_heads * (self.k.nbytes(width_k) + self.v.nbytes(width_v))

    def latent_nbytes(self, width_k: int, width_v: int) -> int:
        """Bytes of one token in one layer of a latent's cache: one row, whose first `width_v` values are the latent.

        Raises:
            ValueError: K and V differ, or the blocks do not divide the row or the latent in it.
        """
        self.require_one_row()
        self._check(width_k, width_v)
        return self.k.nbytes(width_k)

    def require_one_row(self) -> None:
        """Raise ValueError if K and V differ, which a latent's cache has no place for."""
        if self.k != self.v:
            raise ValueError(
                "a latent (MLA) model caches one row per token that is key and value at once, so K and V cannot "
                f"differ; take {self.k.name} or {self.v.name}"
            )

    def _check(self, width_k: int, width_v: int) -> None:
        wrong = [
            f"{side}: {width} values per head do not divide into {kind.name} blocks of {kind.block}"
            for side, kind, width in (("K", self.k, width_k), ("V", self.v, width_v))
            if width % kind.block
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
