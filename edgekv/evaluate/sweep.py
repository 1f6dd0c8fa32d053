"""Sweeps: many conversions and cache types against one reference, and which of them dominate others.

The reference is the model itself in llama.cpp with a float32 cache, run once. Conversions compete with what
needs no conversion: the model's own cache in smaller types.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgekv import __version__
from edgekv.documents import Document, SchemaError, decode, dumps
from edgekv.errors import InputError, UnsupportedError
from edgekv.evaluate.model_under_test import (
    ModelUnderTest,
    Weights,
    beyond_training,
    cache_nbytes_per_token,
    read_tokenizer,
    require_same_tokens,
)
from edgekv.evaluate.reference import Reference, open_reference
from edgekv.evaluate.report import Measured
from edgekv.evaluate.windows import WindowsResult, measure_windows
from edgekv.evaluate.workers import Run
from edgekv.models.open import open_model
from edgekv.progress import Stages
from edgekv.quant.cache_format import CacheFormat
from edgekv.text.files import decoded
from edgekv.text.scored import Text, cut_windows

ORIGINAL = "original"  # the name of the model's own caches among the points
OWN_CACHES = ("f16", "q8_0", "q8_0/q4_0", "q5_0", "q5_0/q4_0", "q4_0")  # what a conversion has to beat


class Conversion(Document, frozen=True):
    """A converted model, as a file or as options of `edgekv convert`, and the caches to run it with."""

    name: str
    cache_types: tuple[str, ...]
    file: str | None = None
    convert: str | None = None


class SweepSpec(Document, frozen=True):
    """One sweep; the field names are the file's keys.

    `cache_types` are the model's own caches, which a conversion has to beat: by default those of OWN_CACHES that
    it can have. With `weights` other than "keep" all models are dequantized, so that they differ in nothing but their
    cache.
    """

    model: str
    text: str
    conversion: tuple[Conversion, ...] = ()
    cache_types: tuple[str, ...] | None = None
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
        spec = decode(SweepSpec, tomllib.loads(decoded(path.read_bytes()).replace("\r\n", "\n")))
        _check(spec)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # SchemaError, TOMLDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: {error}; docs/eval.md shows a sweep file") from error
    return spec


def _check(spec: SweepSpec) -> None:
    if spec.window < 4:
        raise SchemaError("window", f"{spec.window} tokens have no half to score; take 4 or more")
    _check_cache_types("cache_types", spec.cache_types or ())
    seen = {ORIGINAL}
    for i, entry in enumerate(spec.conversion):
        where = f"conversion[{i}]"
        if entry.name in seen:
            raise SchemaError(
                f"{where}.name", f"{entry.name!r} is taken; give each conversion a name of its own"
            )
        seen.add(entry.name)
        if (entry.file is None) == (entry.convert is None):
            raise SchemaError(where, "give either file, a converted GGUF, or convert, options to make one")
        if not entry.cache_types:
            raise SchemaError(f"{where}.cache_types", "at least one is needed")
        _check_cache_types(f"{where}.cache_types", entry.cache_types)


def _check_cache_types(where: str, kinds: tuple[str, ...]) -> None:
    seen = set()
    for i, kind in enumerate(kinds):
        try:
            cache = CacheFormat.parse(kind)
        except ValueError as error:
            raise SchemaError(f"{where}[{i}]", str(error)) from error
        if cache in seen:
            raise SchemaError(f"{where}[{i}]", f"{cache} is there twice")
        seen.add(cache)


FORMAT: Literal["edgekv.sweep"] = "edgekv.sweep"
VERSION = 1


@dataclass(frozen=True)
class SweepPoint:
    """One model with one cache type. `dominated_by` names a point with no more bytes and no more KL, one of them
    less; None if there is none."""

    name: str
    own_cache: bool  # of the original, not of a conversion
    cache_type: str
    cache_nbytes_per_token: float
    kl: float
    kl_se: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_se: float
    argmax_agreement: float
    dominated_by: str | None = None

    @property
    def label(self) -> str:
        """Name and cache type."""
        return f"{self.name} {self.cache_type}"


@dataclass(frozen=True)
class SweepReport:
    """All points of a sweep, the largest cache first."""

    format: Literal["edgekv.sweep"]
    version: int
    edgekv: str
    command: str
    text: str
    text_sha256: str
    window: int
    windows: int
    tokens_scored: int
    reference: Measured
    reference_ppl: float
    points: tuple[SweepPoint, ...]

    def to_json(self) -> str:
        """The whole report."""
        return dumps(self, indent=1) + "\n"


class Sweep:
    """Runs a sweep's points, one after the other.

    Args:
        spec: what to measure; paths in it are relative to `folder`.
        files: the GGUF of each conversion, by name.
        progress: makes a progress line for a stage of this name.
        say: is given a line for people about each point as soon as it is known.

    Raises:
        InputError: a model cannot be read, has other tokens, or cannot have one of its cache types.
        BackendError: the engine failed.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: Path,
        files: Mapping[str, Path],
        run: Run,
        progress: Stages,
        say: Callable[[str], None],
    ) -> None:
        self._spec, self._run, self._progress, self._say = spec, run, progress, say
        self._model = folder / spec.model
        self._text = folder / spec.text
        own = spec.cache_types if spec.cache_types is not None else possible_caches(self._model)
        self._subjects = [
            (ORIGINAL, ModelUnderTest(self._model, "llama.cpp", kind, spec.weights)) for kind in own
        ]
        for name, kind in spec.points():
            require_same_tokens(files[name], self._model)
            self._subjects.append((name, ModelUnderTest(files[name], "llama.cpp", kind, spec.weights)))

    def run(self, limit: int | None, command: str) -> SweepReport:
        """Measure every point on the first `limit` windows."""
        tokenizer = read_tokenizer(self._model)
        text = cut_windows(self._text, tokenizer, self._spec.window, limit)
        if note := beyond_training(self._model, text.length):
            self._say(note)
        subject = ModelUnderTest(self._model, "llama.cpp", "f32", self._spec.weights)
        cache = self._run.folder
        nbytes = [cache_nbytes_per_token(candidate, cache) for _, candidate in self._subjects]
        with open_reference(subject, text, len(tokenizer), cache, self._run.fresh) as reference:
            reference.fill(self._stage("reference"))
            points = [
                self._point(name, candidate, size, text, reference)
                for (name, candidate), size in zip(self._subjects, nbytes, strict=True)
            ]
        results = [result for _, result in points]
        base = results[0].reference_ppl
        assert base is not None
        return SweepReport(
            FORMAT,
            VERSION,
            __version__,
            command,
            text.name,
            text.sha256,
            text.length,
            len(text.windows),
            results[0].tokens_scored,
            Measured.of(subject, cache),
            base,
            mark_dominated([point for point, _ in points]),
        )

    def _point(
        self, name: str, subject: ModelUnderTest, nbytes: float, text: Text, reference: Reference
    ) -> tuple[SweepPoint, WindowsResult]:
        found = measure_windows(subject, text, reference, self._stage(f"{name} {subject.cache}"))
        assert found.kl is not None
        assert found.kl_se is not None
        assert found.ppl_ratio is not None
        assert found.ppl_ratio_se is not None
        assert found.argmax_agreement is not None
        point = SweepPoint(
            name=name,
            own_cache=name == ORIGINAL,
            cache_type=subject.cache,
            cache_nbytes_per_token=nbytes,
            kl=found.kl,
            kl_se=found.kl_se,
            ppl=found.ppl,
            ppl_ratio=found.ppl_ratio,
            ppl_ratio_se=found.ppl_ratio_se,
            argmax_agreement=found.argmax_agreement,
        )
        self._say(
            f"{point.label}: {nbytes:,.0f} bytes per token, KL {point.kl:.6f} ± {point.kl_se:.6f}, "
            f"perplexity x{point.ppl_ratio:.4f}, argmax {point.argmax_agreement:.2%}"
        )
        return point, found

    def _stage(self, name: str) -> Run:
        return replace(self._run, progress=self._progress(name))


def possible_caches(model: Path) -> tuple[str, ...]:
    """Those of OWN_CACHES that can hold the cache of a model; all where only llama.cpp knows its architecture.

    Raises:
        ModelFileError: the file is malformed.
    """
    try:
        spec = open_model(model).spec
    except UnsupportedError:
        return OWN_CACHES
    possible = []
    for kind in OWN_CACHES:
        with contextlib.suppress(ValueError):
            spec.kv_bytes_per_token(kind)
            possible.append(kind)
    return tuple(possible)


def mark_dominated(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """The points, the largest cache first, each with the best of those that dominate it."""
    marked = []
    for point in points:
        here = point.cache_nbytes_per_token, point.kl
        better = [
            other
            for other in points
            if (there := (other.cache_nbytes_per_token, other.kl)) != here
            and there[0] <= here[0]
            and there[1] <= here[1]
        ]
        best = min(better, key=lambda other: other.kl, default=None)
        marked.append(replace(point, dominated_by=best.label if best else None))
    return tuple(sorted(marked, key=lambda point: (-point.cache_nbytes_per_token, point.kl)))


def markdown_table(report: SweepReport) -> str:
    """The points as a table, with the protocol above it."""
    reference = report.reference
    lines = [
        f"KL(original || candidate) in nats per token and perplexity on {report.text}: {report.windows} windows of "
        f"{report.window} tokens, {report.tokens_scored:,} tokens scored; the original is {reference.file} in "
        f"{reference.backend} {reference.engine} with an f32 cache, weights {reference.weights}, perplexity "
        f"{report.reference_ppl:.3f}.",
        "",
        "| model | cache | bytes per token | KL | perplexity | same next token | dominated by |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for point in report.points:
        cells = (
            point.name.replace("|", "\\|"),
            point.cache_type,
            f"{point.cache_nbytes_per_token:,.0f}",
            f"{point.kl:.5f} ± {point.kl_se:.5f}",
            f"x{point.ppl_ratio:.4f} ± {point.ppl_ratio_se:.4f}",
            f"{point.argmax_agreement:.1%}",
            (point.dominated_by or "").replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"    {report.command}", ""])
