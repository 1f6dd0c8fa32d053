"""A bench report: what was run, on what, and what came out, as one versioned JSON document.

The published schema is devices/reporting/report.schema.json, generated from the dataclasses below.
Units are in the names: `_s` seconds, `_nbytes` bytes, `_gb_s` 1e9 bytes a second, `_tps` tokens a second,
`_c` degrees Celsius, `_j` joules, `_mhz` megahertz. Null means not known, and `notes` say why.
"""

# ruff: noqa: RUF009  (_doc returns a dataclasses.field, which ruff cannot see)

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekv.documents import SchemaError, decode, encode, json_schema
from edgekv.errors import InputError

FORMAT: Literal["edgekv.report"] = "edgekv.report"
VERSION = 1
MAX_REPORT_NBYTES = 64 * 2**20  # far above any real report; keeps a wrong file from filling the RAM
Provenance = Literal["measured", "emulated", "projected"]


def _doc(text: str) -> Any:
    return field(metadata={"doc": text})


def _later(text: str) -> Any:
    """A field that older reports do not have."""
    return field(default=None, metadata={"doc": text})


@dataclass(frozen=True)
class Stat:
    """Repeated measurements of one quantity."""

    samples: tuple[float, ...] = _doc("every measurement, in the order taken; empty if they are not known")
    median: float = _doc("median of the samples (the mean, where a foreign report gives only that)")
    low: float = _doc("smallest sample")
    high: float = _doc("largest sample")

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stat:
        """Summarize at least one sample."""
        return cls(tuple(samples), statistics.median(samples), min(samples), max(samples))

    @property
    def spread(self) -> float:
        """(high - low) / median: how far the samples lie apart."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class CoreGroup:
    """Cores of one kind."""

    cpus: tuple[int, ...] = _doc("logical CPU numbers")
    name: str = _doc("microarchitecture or CPU model")
    max_mhz: float | None = _doc("highest clock")


@dataclass(frozen=True)
class Machine:
    """The computer."""

    board: str = _doc("board or computer model")
    soc: str | None = _doc("system on chip")
    arch: str = _doc("instruction set, as uname says")
    cores: tuple[CoreGroup, ...] = _doc("the fastest group first")
    isa_flags: tuple[str, ...] = _doc("CPU features that matter to inference kernels")
    ram_nbytes: int | None = _doc("total memory")
    available_nbytes: int | None = _doc("memory free for new programs when the run began")
    swap_nbytes: int | None = _doc("total swap")
    memory_type: str | None = _doc("such as LPDDR4X, where the machine tells")
    governor: str | None = _doc("CPU frequency governor")
    kernel: str = _doc("operating system and kernel release")
    emulator: str | None = _doc("set when the CPU is emulated: times are then not those of a real board")
    card: str | None = _later("the GPU that ran the layers, where the engine is built for one")
    card_nbytes: int | None = _later("its memory")


@dataclass(frozen=True)
class Software:
    """The programs."""

    edgekv: str | None = _doc("version of EdgeKV")
    python: str | None = _doc("version of Python")
    llama_cpp: str | None = _doc("llama-cpp-python version or llama.cpp build")
    llama_cpp_features: tuple[str, ...] = _doc("CPU features that the llama.cpp build uses")
    onnxruntime: str | None = _doc("version of onnxruntime, if it ran the model")


@dataclass(frozen=True)
class Settings:
    """How it was measured."""

    n_prompt: int = _doc("tokens of each timed prefill")
    n_gen: int = _doc("tokens of each timed decode")
    repeats: int = _doc("timed samples a point")
    depths: tuple[int, ...] = _doc("tokens in the cache before the timed ones")
    threads: int | None = _doc("threads of the engine")
    cpus: tuple[int, ...] = _doc("logical CPUs the run was allowed to use; empty if not known")
    turns: bool = _doc("true: the candidates took turns, sample by sample; false: one after the other")


@dataclass(frozen=True)
class ModelInfo:
    """The model file."""

    file: str = _doc("file name")
    sha256: str | None = _doc("of the whole file")
    name: str = _doc("the model's own name")
    arch: str = _doc("GGUF architecture")
    attention: str | None = _doc("MHA, GQA, MQA or MLA")
    n_layers: int | None = _doc("transformer blocks")
    n_params: int | None = _doc("weights")
    quantization: str = _doc("how most weights are stored")
    weights_nbytes: int | None = _doc("bytes of all tensors")
    read_nbytes: int | None = _doc("weight bytes read for one decoded token")
    flops: int | None = _doc("weight FLOPs of one token")
    flops_per_cached_token: int | None = _doc("attention FLOPs of one token for each token in the cache")
    context_length: int | None = _doc("the context the model was trained for")


@dataclass(frozen=True)
class CacheInfo:
    """The KV cache."""

    type: str = _doc("storage type of its values")
    values_per_token: int | None = _doc("values cached for a token, all layers")
    nbytes_per_token: int | None = _doc("bytes cached for a token, all layers")
    n_ctx: int | None = _doc("tokens it was made for")


@dataclass(frozen=True)
class Memory:
    """Where the memory of the process went."""

    peak_rss_nbytes: int = _doc("highest resident set of the process")
    weights_nbytes: int | None = _doc("weights: mapped from the file and repacked")
    cache_nbytes: int | None = _doc("KV cache as the engine allocated it")
    compute_nbytes: int | None = _doc(
        "what running added after loading: the engine's compute and output buffers"
    )
    other_nbytes: int | None = _doc("the rest of the peak: interpreter, libraries, tokenizer")
    card_nbytes: int | None = _later("what the run took of the GPU's memory, beside `peak_rss_nbytes` in RAM")


@dataclass(frozen=True)
class Point:
    """Speed with `depth` tokens in the cache."""

    depth: int = _doc("tokens in the cache before the timed ones")
    ttft_s: Stat | None = _doc("time from the prompt's n_prompt tokens to the first answer token")
    prefill_tps: Stat | None = _doc("prompt tokens a second")
    decode_tps: Stat | None = _doc("answer tokens a second, one at a time")
    decode_j_per_token: float | None = _doc("energy of a decoded token")
    decode_nbytes: int | None = _doc("weight and cache bytes read for one decoded token")
    roofline_share: float | None = _doc("decode_nbytes a token / time, as a share of the measured bandwidth")


@dataclass(frozen=True)
class Health:
    """Heat and throttling at one moment."""

    temperature_c: Mapping[str, float] = _doc("by sensor")
    throttling: tuple[str, ...] | None = _doc("throttling in words; empty if there is none")


@dataclass(frozen=True)
class Run:
    """One model with one cache type in one process."""

    label: str = _doc("short name, unique in the report")
    engine: str = _doc("backend that ran it")
    model: ModelInfo = _doc("the model")
    cache: CacheInfo = _doc("its cache")
    load_s: float | None = _doc("opening the model until it is ready")
    first_ttft_s: float | None = _doc("the first prompt after loading: nothing is warm")
    points: tuple[Point, ...] = _doc("by depth")
    memory: Memory | None = _doc("memory of the process")
    bandwidth_gb_s: float | None = _doc("measured read bandwidth of the run's cores")
    bandwidth_nbytes: int | None = _doc("size of the array that the bandwidth was measured on")
    energy_source: str | None = _doc("what measured the energy")
    before: Health | None = _doc("before the run")
    after: Health | None = _doc("after the run")
    error: str | None = _doc("why the run has no or few results")


@dataclass(frozen=True)
class Report:
    """One bench run, or one projection."""

    format: Literal["edgekv.report"] = _doc("what this document is")
    version: int = _doc("of this schema")
    provenance: Literal["measured", "emulated", "projected"] = _doc("where the numbers come from")
    created: str = _doc("ISO 8601 time, UTC")
    command: str = _doc("what produced it")
    machine: Machine = _doc("the computer")
    software: Software = _doc("the programs")
    settings: Settings = _doc("how it was measured")
    runs: tuple[Run, ...] = _doc("the candidates")
    notes: tuple[str, ...] = _doc("what could not be read, and why; warnings")


def dumps(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(encode(report), indent=1, allow_nan=False) + "\n"


def schema_text() -> str:
    """The published JSON Schema; devices/reporting/report.schema.json holds exactly this."""
    title = f"EdgeKV report, version {VERSION}"
    return json.dumps(json_schema(Report, f"urn:edgekv:report:{VERSION}", title), indent=1) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file of a plausible size.

    Raises:
        InputError: it cannot be read, or it is not JSON.
    """
    try:
        if path.stat().st_size > MAX_REPORT_NBYTES:
            raise InputError(f"{path} is larger than any report ({MAX_REPORT_NBYTES >> 20} MiB); wrong file?")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file; give a report that `edgekv bench -o` wrote") from error
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise InputError(
            f"{path} is not valid JSON ({where}); it may be cut short: run the bench again"
        ) from error


def parse_report(value: Any, path: Path) -> Report:
    """A Report from parsed JSON.

    Raises:
        InputError: not a report, made by a newer EdgeKV, or edited into something else.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} is JSON, but not an EdgeKV report; `edgekv bench MODEL -o FILE` writes one")
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{path}: version: expected a whole number from 1, found {version!r}")
    if version > VERSION:
        raise InputError(
            f"{path} has report version {version}, this EdgeKV reads up to {VERSION}: "
            "upgrade with `pip install -U edgekv`"
        )
    try:
        report = decode(Report, value)
    except SchemaError as error:
        raise InputError(f"{path}: {error}; it was edited or damaged: run the bench again") from error
    if problem := nonsense(report):
        raise InputError(f"{path}: {problem}; it was edited or damaged: run the bench again")
    return report


def nonsense(report: Report) -> str | None:
    """What no bench could have measured, or None; a hand-edited report has the right types all the same."""
    if not report.runs:
        return "runs: there are none"
    labels = [run.label for run in report.runs]
    if len(set(labels)) < len(labels):
        return "runs: two have the same label"
    for i, run in enumerate(report.runs):
        if run.memory and run.memory.peak_rss_nbytes <= 0:
            return f"runs[{i}].memory.peak_rss_nbytes: {run.memory.peak_rss_nbytes} bytes"
        for j, point in enumerate(run.points):
            where = f"runs[{i}].points[{j}]"
            if point.depth < 0:
                return f"{where}.depth: {point.depth}"
            for name in ("ttft_s", "prefill_tps", "decode_tps"):
                stat: Stat | None = getattr(point, name)
                if stat and not 0 < stat.low <= stat.median <= stat.high:
                    return f"{where}.{name}: {stat.low} <= {stat.median} <= {stat.high} does not hold"
    return None


def load_report(path: Path) -> Report:
    """Read an EdgeKV report; raises InputError as `read_json` and `parse_report` do."""
    return parse_report(read_json(path), path)
