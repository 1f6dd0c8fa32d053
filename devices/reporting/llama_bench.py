"""Reports from the JSON of `llama-bench -o json`, so that anyone's results compare.

Fields: ggml-org/llama.cpp tools/llama-bench/llama-bench.cpp, `test::get_fields`. Builds before mid 2025 have
no n_depth; none has TTFT, memory, temperature or power, and on Arm the CPU is just "CPU". An array may hold a
sweep over any option, several builds or machines: tests that differ in a field are runs of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert

from edgekv.devices.reporting.llama_bench_text import LlamaBench
from edgekv.devices.reporting.report import (
    FORMAT,
    VERSION,
    BenchRun,
    CacheInfo,
    Machine,
    ModelInfo,
    Point,
    Report,
    Settings,
    Software,
    Stat,
)
from edgekv.errors import InputError

# Fields that may differ among the tests of one run: what was timed, and what came out.
_TIMED = ("n_prompt", "n_gen", "n_depth", "test_time")
_RESULTS = ("avg_", "stddev_", "samples_")  # what their names begin with
_IN_EVERY_LABEL = ("model_filename", "type_k", "type_v", "n_threads")
# What a run was made with and by, not how: told where the rest of the label does not tell runs apart.
_ORIGINS = (
    *("model_type", "backends", "gpu_info", "cpu_info", "build_number", "build_commit"),
    *("model_size", "model_n_params"),
)
_REPORT = ("cpu_info", "gpu_info", "build_commit", "build_number", "n_threads")  # what a Report has once
_OPTIONS = {  # field: llama-bench's option, where that is not the field without underscores
    **{"n_batch": "b", "n_ubatch": "ub", "cpu_mask": "C", "n_gpu_layers": "ngl", "n_cpu_moe": "ncmoe"},
    **{"split_mode": "sm", "main_gpu": "mg", "no_kv_offload": "nkvo", "flash_attn": "fa", "devices": "dev"},
    **{"tensor_split": "ts", "tensor_buft_overrides": "ot", "use_mmap": "mmap", "use_direct_io": "dio"},
    **{"embeddings": "embd", "no_op_offload": "nopo", "build_number": "build"},
}


Count = Annotated[int, Meta(ge=0, le=2**62)]
Speed = Annotated[float, Meta(gt=0, lt=1e15)]  # tokens/s: sums and ratios of what passes are finite


class Test(Struct):
    """One test; fields without a default are in the output of every build."""

    model_filename: str
    n_prompt: Count
    n_gen: Count
    avg_ts: Speed
    n_depth: Count = 0
    samples_ts: tuple[Speed, ...] = ()
    model_type: str = ""
    model_size: Count | None = None
    model_n_params: Count | None = None
    type_k: str = ""
    type_v: str = ""
    n_threads: Count | None = None
    n_gpu_layers: int | str = ""
    cpu_info: str = ""
    gpu_info: str = ""
    build_commit: str = "unknown"
    test_time: str = "unknown"

    @property
    def cache_type(self) -> str:
        """As `--cache-type` spells it: one name, or K's and V's where they differ; llama-bench's own are f16."""
        return "/".join(dict.fromkeys((self.type_k or "f16", self.type_v or "f16")))


class _Run:
    """Tests of one model on one machine with the same options."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.tests: list[Test] = []
        self.label = self.file = ""

    def tell(self, name: str) -> None:
        """Put a field into the label."""
        if (value := self.fields.get(name)) in (None, ""):
            return
        shown = str(int(value) if isinstance(value, bool) else value)
        option = _OPTIONS.get(name, name.removeprefix("n_").replace("_", "-"))
        if name in _ORIGINS and name != "build_number":
            self.label += f" {shown}"
        else:
            self.label += f" {option}{shown}" if shown.isdigit() else f" {option}={shown}"


def parse_llama_bench(found: LlamaBench, path: Path) -> tuple[Report, ...]:
    """Reports from the tests of a file, one per machine, build and number of threads.

    Tests of prompt and answer together are left out.

    Raises:
        InputError: a test lacks what every build writes, or holds another kind of value; or none can be used.
    """
    try:
        tests = convert(found.tests, list[Test])
    except (ValidationError, OverflowError) as error:
        raise InputError(
            f"{path}: {error}; llama-bench did not write it so: take an unedited output of `llama-bench -o json`"
        ) from error
    notes = ["read from llama-bench: TTFT, memory, temperature and energy were not measured"]
    notes += [found.note] if found.note else []
    runs: dict[str, _Run] = {}
    for test, fields in zip(tests, found.tests, strict=True):
        if not (test.n_prompt and test.n_gen):
            key = {
                name: value
                for name, value in sorted(fields.items())
                if name not in _TIMED and not name.startswith(_RESULTS)
            }
            runs.setdefault(repr(key), _Run(key)).tests.append(test)
    used = sum(len(run.tests) for run in runs.values())
    if used < len(tests):
        notes.append(f"{len(tests) - used} tests of prompt and answer together are left out")
    if not runs:
        raise InputError(f"{path}: no test of prefill or decode alone; run llama-bench with -p and -n")
    _name(list(runs.values()))
    reports: dict[str, list[_Run]] = {}
    for run in runs.values():
        reports.setdefault(repr([run.fields.get(name) for name in _REPORT]), []).append(run)
    return tuple(_report(group, notes if i == 0 else []) for i, group in enumerate(reports.values()))


def _report(runs: Sequence[_Run], notes: Sequence[str]) -> Report:
    first, said = runs[0].tests[0], list(notes)
    return Report(
        format=FORMAT,
        version=VERSION,
        provenance="measured",
        created=first.test_time,
        command="llama-bench",
        machine=_machine(first),
        software=Software(llama_cpp=f"build {first.build_commit}"),
        settings=_settings([test for run in runs for test in run.tests]),
        runs=tuple(_run(run, said) for run in runs),
        notes=tuple(said),
    )


def _name(runs: Sequence[_Run]) -> None:
    """Give every run a label of its own that says what differs: model, cache, threads, and options that vary."""
    files = _short_names({run.tests[0].model_filename for run in runs})
    for run in runs:
        test, run.file = run.tests[0], files[run.tests[0].model_filename]
        threads = "" if test.n_threads is None else test.n_threads
        run.label = f"{run.file.removesuffix('.gguf')} {test.cache_type} t{threads}"
    _tell_options(runs)
    for alike in _same_label(runs):
        for number, run in enumerate(alike[1:], start=2):
            run.label += f" #{number}"


def _tell_options(runs: Sequence[_Run]) -> None:
    """Add to all labels the options that vary, and to labels that are still alike whatever differs."""
    names = sorted({name for run in runs for name in run.fields if name not in _IN_EVERY_LABEL})
    for name in names:
        known = {repr(run.fields[name]) for run in runs if name in run.fields}
        for run in runs:
            layers = name == "n_gpu_layers" and str(run.tests[0].n_gpu_layers) not in ("", "0", "-1")
            if layers or (len(known) > 1 and name not in _ORIGINS):
                run.tell(name)
    for name in (*_ORIGINS, *(name for name in names if name not in _ORIGINS)):
        for alike in _same_label(runs):
            if len({repr(run.fields.get(name)) for run in alike}) > 1:
                for run in alike:
                    run.tell(name)


def _same_label(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """Runs that share a label."""
    labels = [run.label for run in runs]
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            yield [run for run in runs if run.label == label]


def _short_names(files: set[str]) -> dict[str, str]:
    """File names, with as many folders as tell files of one name apart; also of paths from Windows."""
    parts = {file: PureWindowsPath(file).parts or (file,) for file in files}
    short = {}
    for file, mine in parts.items():
        tails = range(1, len(mine))
        alone = (n for n in tails if sum(other[-n:] == mine[-n:] for other in parts.values()) == 1)
        short[file] = "/".join(mine[-next(alone, len(mine)) :])
    return short


def _run(run: _Run, notes: list[str]) -> BenchRun:
    test = run.tests[0]
    words = test.model_type.split()
    model = ModelInfo(
        file=run.file,
        name=test.model_type or run.file,
        arch=words[0] if words else "unknown",
        n_params=test.model_n_params or None,
        quantization=" ".join(words[2:]) or "unknown",
        weights_nbytes=test.model_size or None,
    )
    depths = sorted({t.n_depth for t in run.tests})
    return BenchRun(
        label=run.label,
        engine="llama-bench",
        model=model,
        cache=CacheInfo(test.cache_type),
        points=tuple(_point(depth, run.tests, run.label, notes) for depth in depths),
    )


def _point(depth: int, tests: Sequence[Test], label: str, notes: list[str]) -> Point:
    """One depth. Where several lengths were timed, the longest prefill and the longest decode count."""
    here = [t for t in tests if t.n_depth == depth]
    found: list[Stat | None] = []
    for name, timed in (("pp", [t for t in here if t.n_prompt]), ("tg", [t for t in here if t.n_gen])):
        sizes = sorted({t.n_prompt or t.n_gen for t in timed})
        longest = [t for t in timed if (t.n_prompt or t.n_gen) == sizes[-1]]
        if len(sizes) > 1:
            notes.append(
                f"{label}: {name}{f', {name}'.join(map(str, sizes))} at depth {depth}: the longest is shown"
            )
        if len(longest) > 1:
            notes.append(
                f"{label}: {name}{sizes[-1]} at depth {depth} was timed in {len(longest)} tests: all samples count"
            )
        found.append(_stat(longest) if longest else None)
    return Point(depth=depth, prefill_tps=found[0], decode_tps=found[1])


def _stat(tests: Sequence[Test]) -> Stat:
    """Of all samples; of the averages where a test does not give its samples."""
    if all(test.samples_ts for test in tests):
        return Stat.of([sample for test in tests for sample in test.samples_ts])
    means = Stat.of([test.avg_ts for test in tests])
    return Stat((), means.median, means.low, means.high)


def _machine(test: Test) -> Machine:
    cpu = test.cpu_info or "unknown CPU"
    board = f"{test.gpu_info} on {cpu}" if test.gpu_info else cpu
    return Machine(board=board, arch="unknown", cores=(), isa_flags=(), kernel="unknown")


def _settings(tests: Sequence[Test]) -> Settings:
    return Settings(
        n_prompt=max(test.n_prompt for test in tests),
        n_gen=max(test.n_gen for test in tests),
        repeats=max(len(test.samples_ts) for test in tests),
        depths=tuple(sorted({test.n_depth for test in tests})),
        threads=tests[0].n_threads or None,
        cpus=(),
        turns=False,
    )
