"""What a sweep is to measure: a TOML file that names a model, a text, conversions and cache types."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import InputError
from edgekv.evaluate.subject import Weights
from edgekv.schema import SchemaError, decode
from edgekv.spec import CACHE_BLOCKS

ORIGINAL = "original"  # the name of the model's own caches among the points


@dataclass(frozen=True)
class Conversion:
    """A converted model, as a file or as options of `edgekv convert`, and the caches to run it with."""

    name: str
    cache_types: tuple[str, ...]
    file: str | None = None
    convert: str | None = None


@dataclass(frozen=True)
class SweepSpec:
    """One sweep; the field names are the file's keys.

    `cache_types` are the model's own caches, the line that a conversion has to beat. With `weights` other than
    "stored" all models are dequantized, so that they differ in nothing but their cache.
    """

    model: str
    text: str
    conversion: tuple[Conversion, ...] = ()
    cache_types: tuple[str, ...] = ("f16", "q8_0", "q5_0", "q4_0")
    window: int = 1024
    weights: Weights = "f32"

    def points(self) -> Iterator[tuple[str, str]]:
        """(name of the conversion, cache type) of every point; the model's own are not among them."""
        return ((entry.name, kind) for entry in self.conversion for kind in entry.cache_types)


def read_sweep(path: Path) -> SweepSpec:
    """A sweep's file.

    Raises:
        InputError: it cannot be read, is not TOML, or asks for something impossible; the message names the place.
    """
    try:
        spec = decode(SweepSpec, tomllib.loads(path.read_text(encoding="utf-8")))
        _check(spec)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (SchemaError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError among them
        raise InputError(f"{path}: {error}; docs/eval.md shows a sweep file") from error
    return spec


def _check(spec: SweepSpec) -> None:
    if spec.window < 4:
        raise SchemaError("window", f"{spec.window} tokens have no half to score; take 4 or more")
    _check_cache_types("cache_types", spec.cache_types)
    seen = {ORIGINAL}
    for i, entry in enumerate(spec.conversion):
        where = f"conversion[{i}]"
        if entry.name in seen:
            raise SchemaError(f"{where}.name", f"{entry.name!r} is taken; names tell points apart")
        seen.add(entry.name)
        if (entry.file is None) == (entry.convert is None):
            raise SchemaError(where, "give either file, a converted GGUF, or convert, options to make one")
        if not entry.cache_types:
            raise SchemaError(f"{where}.cache_types", "at least one is needed")
        _check_cache_types(f"{where}.cache_types", entry.cache_types)


def _check_cache_types(where: str, kinds: tuple[str, ...]) -> None:
    for i, kind in enumerate(kinds):
        if kind not in CACHE_BLOCKS:
            raise SchemaError(
                f"{where}[{i}]", f"unknown cache type {kind!r}; known: {', '.join(CACHE_BLOCKS)}"
            )
        if kind in kinds[:i]:
            raise SchemaError(f"{where}[{i}]", f"{kind} is there twice")
