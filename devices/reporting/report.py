"""Bench reports: machine, settings and figures of a run, as one versioned JSON document.

The published schema is devices/reporting/report.schema.json, generated from the types below.
Units are in the names: `_s` seconds, `_nbytes` bytes, `_gb_s` 1e9 bytes per second, `_tps` tokens per second,
`_c` degrees Celsius, `_j` joules, `_mhz` megahertz. Null means not known, and `notes` say why.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgekv import documents
from edgekv.documents import Document, SchemaError, decode
from edgekv.errors import InputError

FORMAT: Literal["edgekv.report"] = "edgekv.report"
VERSION = 1
MAX_REPORT_NBYTES = 64 * 2**20  # far above any real report; keeps a wrong file from filling the RAM
Provenance = Literal["measured", "emulated", "projected"]


def doc(text: str) -> Meta:
    """A field's description in the schema."""
    return Meta(description=text)


class Stat(Document, frozen=True):
    """Repeated measurements of one quantity."""

    samples: Annotated[tuple[float, ...], doc("every measurement, in the order taken; empty if not known")]
    median: Annotated[float, doc("median of the samples (the mean, where a foreign report gives only that)")]
    low: Annotated[float, doc("smallest sample")]
    high: Annotated[float, doc("largest sample")]

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high:
            raise ValueError(f"{self.low} <= {self.median} <= {self.high} does not hold, or is not positive")

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stat:
        """Summarize at least one sample."""
        return cls(tuple(samples), statistics.median(samples), min(samples), max(samples))

    @property
    def spread(self) -> float:
        """(high - low) / median: how far the samples lie apart."""
        return (self.high - self.low) / self.median


class CoreGroup(Document, frozen=True):
    """Cores of one kind."""

    cpus: Annotated[tuple[int, ...], doc("logical CPU numbers")]
    name: Annotated[str, doc("microarchitecture or CPU model")]
    max_mhz: Annotated[float | None, doc("highest clock")]


class Machine(Document, frozen=True, kw_only=True):
    """The computer."""

    board: Annotated[str, doc("board or computer model")]
    soc: Annotated[str | None, doc("system on chip")] = None
    arch: Annotated[str, doc("instruction set, as uname says")]
    cores: Annotated[tuple[CoreGroup, ...], doc("the fastest group first")]
    isa_flags: Annotated[tuple[str, ...], doc("CPU features that matter to inference kernels")]
    ram_nbytes: Annotated[int | None, doc("total memory")] = None
    available_nbytes: Annotated[int | None, doc("memory free for new programs when the run began")] = None
    swap_nbytes: Annotated[int | None, doc("total swap")] = None
    memory_type: Annotated[str | None, doc("such as LPDDR4X, where the machine tells")] = None
    governor: Annotated[str | None, doc("CPU frequency governor")] = None
    kernel: Annotated[str, doc("operating system and kernel release")]
    emulator: Annotated[str | None, doc("set when the CPU is emulated: times are not a board's")] = None
    card: Annotated[str | None, doc("the GPU that ran the layers, where the engine is built for one")] = None
    card_nbytes: Annotated[int | None, doc("its memory")] = None


class Software(Document, frozen=True):
    """The programs."""

    edgekv: Annotated[str | None, doc("version of EdgeKV")] = None
    python: Annotated[str | None, doc("version of Python")] = None
    llama_cpp: Annotated[str | None, doc("llama-cpp-python version or llama.cpp build")] = None
    llama_cpp_features: Annotated[tuple[str, ...], doc("CPU features that the llama.cpp build uses")] = ()
    onnxruntime: Annotated[str | None, doc("version of onnxruntime, if it ran the model")] = None


class Settings(Document, frozen=True):
    """How it was measured."""

    n_prompt: Annotated[int, doc("tokens of each timed prefill")]
    n_gen: Annotated[int, doc("tokens of each timed decode")]
    repeats: Annotated[int, doc("timed samples per point")]
    depths: Annotated[tuple[int, ...], doc("tokens in the cache before the timed ones")]
    threads: Annotated[int | None, doc("threads of the engine")]
    cpus: Annotated[tuple[int, ...], doc("logical CPUs the run was allowed to use; empty if not known")]
    turns: Annotated[bool, doc("true: in turns, sample by sample; false: one candidate after the other")]


class ModelInfo(Document, frozen=True, kw_only=True):
    """The model file."""

    file: Annotated[str, doc("file name")]
    sha256: Annotated[str | None, doc("of the whole file")] = None
    name: Annotated[str, doc("the model's own name")]
    arch: Annotated[str, doc("GGUF architecture")]
    attention: Annotated[str | None, doc("MHA, GQA, MQA or MLA")] = None
    n_layers: Annotated[int | None, doc("transformer blocks")] = None
    n_params: Annotated[int | None, doc("weights")] = None
    quantization: Annotated[str, doc("how most weights are stored")]
    weights_nbytes: Annotated[int | None, doc("bytes of all tensors")] = None
    read_nbytes: Annotated[int | None, doc("weight bytes read for one decoded token")] = None
    flops: Annotated[int | None, doc("weight FLOPs of one token")] = None
    flops_per_cached_token: Annotated[int | None, doc("attention FLOPs of one token per cached token")] = None
    context_length: Annotated[int | None, doc("the context the model was trained for")] = None


class CacheInfo(Document, frozen=True, omit_defaults=True):
    """The KV cache."""

    type: Annotated[str, doc("storage type, or K's and V's as in q8_0/q4_0")]
    values_per_token: Annotated[int | None, doc("values cached per token, all layers")] = None
    nbytes_per_token: Annotated[int | None, doc("bytes cached per token, all layers")] = None
    n_ctx: Annotated[int | None, doc("tokens it was made for")] = None
    window: Annotated[int | None, doc("tokens that layers with a sliding window see")] = None
    window_nbytes_per_token: Annotated[
        int | None, doc("of `nbytes_per_token`, those of layers with a window")
    ] = None

    def read_nbytes(self, depth: float) -> float | None:
        """Bytes that one token reads with `depth` tokens in the cache; None where they are not known."""
        if self.nbytes_per_token is None:
            return None
        unseen = max(0.0, depth - self.window) if self.window else 0.0
        return self.nbytes_per_token * depth - (self.window_nbytes_per_token or 0) * unseen


class Memory(Document, frozen=True):
    """Where the memory of the process went."""

    peak_rss_nbytes: Annotated[int, Meta(gt=0, description="highest resident set of the process")]
    weights_nbytes: Annotated[int | None, doc("weights: mapped from the file and repacked")] = None
    cache_nbytes: Annotated[int | None, doc("KV cache as the engine allocated it")] = None
    compute_nbytes: Annotated[int | None, doc("what running added: compute and output buffers")] = None
    other_nbytes: Annotated[int | None, doc("the rest of the peak: interpreter, libraries, tokenizer")] = None
    card_nbytes: Annotated[int | None, doc("the GPU's memory, beside `peak_rss_nbytes` in RAM")] = None


class Point(Document, frozen=True):
    """Speed with `depth` tokens in the cache."""

    depth: Annotated[int, Meta(ge=0, description="tokens in the cache before the timed ones")]
    ttft_s: Annotated[Stat | None, doc("time from n_prompt prompt tokens to the first answer token")] = None
    prefill_tps: Annotated[Stat | None, doc("prompt tokens per second")] = None
    decode_tps: Annotated[Stat | None, doc("answer tokens per second, one at a time")] = None
    decode_j_per_token: Annotated[float | None, doc("energy of a decoded token")] = None
    decode_nbytes: Annotated[int | None, doc("weight and cache bytes read for one decoded token")] = None
    roofline_share: Annotated[float | None, doc("decode_nbytes / time, as a share of the bandwidth")] = None


class Health(Document, frozen=True):
    """Heat and throttling at one moment."""

    temperature_c: Annotated[Mapping[str, float], doc("by sensor")]
    throttling: Annotated[tuple[str, ...] | None, doc("throttling in words; empty if there is none")]


class BenchRun(Document, frozen=True):
    """One model with one cache type in one process."""

    label: Annotated[str, doc("short name, unique in the report")]
    engine: Annotated[str, doc("backend that ran it")]
    model: Annotated[ModelInfo, doc("the model")]
    cache: Annotated[CacheInfo, doc("its cache")]
    load_s: Annotated[float | None, doc("opening the model until it is ready")] = None
    first_ttft_s: Annotated[float | None, doc("the first prompt after loading: nothing is warm")] = None
    points: Annotated[tuple[Point, ...], doc("by depth")] = ()
    memory: Annotated[Memory | None, doc("memory of the process")] = None
    bandwidth_gb_s: Annotated[float | None, doc("measured read bandwidth of the run's cores")] = None
    bandwidth_nbytes: Annotated[int | None, doc("size of the array that was read for it")] = None
    energy_source: Annotated[str | None, doc("what measured the energy")] = None
    before: Annotated[Health | None, doc("before the run")] = None
    after: Annotated[Health | None, doc("after the run")] = None
    error: Annotated[str | None, doc("why the run has no or few results")] = None


class Report(Document, frozen=True):
    """One bench run, or one projection."""

    format: Annotated[Literal["edgekv.report"], doc("what this document is")]
    version: Annotated[int, Meta(ge=1, description="of this schema")]
    provenance: Annotated[Provenance, doc("where the numbers come from")]
    created: Annotated[str, doc("ISO 8601 time, UTC")]
    command: Annotated[str, doc("what produced it")]
    machine: Annotated[Machine, doc("the computer")]
    software: Annotated[Software, doc("the programs")]
    settings: Annotated[Settings, doc("how it was measured")]
    runs: Annotated[tuple[BenchRun, ...], Meta(min_length=1, description="the candidates")]
    notes: Annotated[tuple[str, ...], doc("what could not be read, and why; warnings")]


def dumps(report: Report) -> str:
    """The report as JSON text."""
    return documents.dumps(report, indent=1) + "\n"


def read_text(path: Path) -> str:
    """The text of a file of a plausible size, in UTF-8, or in UTF-16 as PowerShell's `>` writes it.

    Raises:
        InputError: it cannot be read, or it is not text.
    """
    try:
        if path.stat().st_size > MAX_REPORT_NBYTES:
            raise InputError(f"{path} is larger than any report ({MAX_REPORT_NBYTES >> 20} MiB); wrong file?")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in {encoding.upper()} ({error.reason} at byte {error.start}); take the file as the "
            "bench wrote it"
        ) from error


def read_json(path: Path) -> Any:
    """Parse a JSON file of a plausible size.

    Raises:
        InputError: it cannot be read, or it is not JSON.
    """
    try:
        return documents.parse(read_text(path))
    except SchemaError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); take the file as the bench wrote it"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply for a report; wrong file?") from error


def parse_report(value: Any, path: Path) -> Report:
    """A Report from parsed JSON.

    Raises:
        InputError: not a report, made by a newer EdgeKV, or edited into something else.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        if value == []:
            raise InputError(f"{path} is an empty list: llama-bench finished no test; run it again")
        raise InputError(
            f"{path} is JSON, but not an EdgeKV report, as `edgekv bench MODEL -o FILE` writes it, nor llama-bench's"
        )
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path} has report version {version}, this EdgeKV reads up to {VERSION}: "
            "upgrade with `pip install -U edgekv`"
        )
    try:
        report = decode(Report, value)
        if len({run.label for run in report.runs}) < len(report.runs):
            raise SchemaError("runs", "two have the same label")
    except SchemaError as error:
        raise InputError(f"{path}: {error}; it was edited or damaged: run the bench again") from error
    return report
