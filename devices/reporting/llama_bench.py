"""Reports from the JSON of `llama-bench -o json`, so that anyone's results compare.

Fields: ggml-org/llama.cpp tools/llama-bench/llama-bench.cpp, `test::get_fields`. Builds before mid 2025 have
no n_depth; none has TTFT, memory, temperature or power, and on Arm the CPU is just "CPU".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert

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


class Test(Struct):
    """One test; fields without a default are in the output of every build."""

    model_filename: str
    n_prompt: Annotated[int, Meta(ge=0)]
    n_gen: Annotated[int, Meta(ge=0)]
    avg_ts: Annotated[float, Meta(gt=0)]
    n_depth: Annotated[int, Meta(ge=0)] = 0
    samples_ts: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    model_type: str = ""
    model_size: int | None = None
    model_n_params: int | None = None
    type_k: str = ""
    type_v: str = ""
    n_threads: int | None = None
    n_gpu_layers: int | str = ""
    flash_attn: bool | int | str = ""
    backends: str = ""
    cpu_info: str = ""
    gpu_info: str = ""
    build_commit: str = "unknown"
    test_time: str = "unknown"

    @property
    def candidate(self) -> tuple[Any, ...]:
        """What two tests of the same candidate share."""
        names = ("model_filename", "type_k", "type_v", "n_threads", "n_gpu_layers", "flash_attn", "backends")
        return tuple(getattr(self, name) for name in names)


def looks_like_llama_bench(value: Any) -> bool:
    """A list of objects that name a model file."""
    return (
        isinstance(value, list)
        and value != []
        and isinstance(value[0], dict)
        and "model_filename" in value[0]
    )


def parse_llama_bench(value: Any, path: Path) -> Report:
    """A Report from the parsed JSON of llama-bench; tests of prompt and answer together are left out.

    Raises:
        InputError: a test lacks what every build writes, or holds another kind of value; or none can be used.
    """
    try:
        tests = convert(value, list[Test])
    except ValidationError as error:
        raise InputError(
            f"{path}: {error}; llama-bench did not write it so: take an unedited output of `llama-bench -o json`"
        ) from error
    notes = ["read from llama-bench: TTFT, memory, temperature and energy were not measured"]
    used = [test for test in tests if not (test.n_prompt and test.n_gen)]
    if len(used) < len(tests):
        notes.append(f"{len(tests) - len(used)} tests of prompt and answer together are left out")
    if not used:
        raise InputError(f"{path}: no test of prefill or decode alone; run llama-bench with -p and -n")
    groups: dict[tuple[Any, ...], list[Test]] = {}
    for test in used:
        groups.setdefault(test.candidate, []).append(test)
    first = used[0]
    return Report(
        format=FORMAT,
        version=VERSION,
        provenance="measured",
        created=first.test_time,
        command="llama-bench",
        machine=_machine(first),
        software=Software(llama_cpp=f"build {first.build_commit}"),
        settings=_settings(used),
        runs=tuple(_run(group, notes) for group in groups.values()),
        notes=tuple(notes),
    )


def _run(tests: Sequence[Test], notes: list[str]) -> BenchRun:
    test = tests[0]
    file = Path(test.model_filename).name
    types = test.type_k if test.type_k == test.type_v else f"{test.type_k}/{test.type_v}"
    label = f"{Path(file).stem} {types or 'f16'} t{'' if test.n_threads is None else test.n_threads}"
    if str(test.n_gpu_layers) not in ("", "0", "-1"):
        label += f" ngl{test.n_gpu_layers}"
    words = test.model_type.split()
    model = ModelInfo(
        file=file,
        name=test.model_type or file,
        arch=words[0] if words else "unknown",
        n_params=test.model_n_params or None,
        quantization=" ".join(words[2:]) or "unknown",
        weights_nbytes=test.model_size or None,
    )
    return BenchRun(
        label=label,
        engine="llama-bench",
        model=model,
        cache=CacheInfo(types or "f16"),
        points=tuple(_point(depth, tests, label, notes) for depth in sorted({t.n_depth for t in tests})),
    )


def _point(depth: int, tests: Sequence[Test], label: str, notes: list[str]) -> Point:
    """One depth. Where several lengths were timed, the longest prefill and the longest decode count."""
    here = [t for t in tests if t.n_depth == depth]
    prefills = sorted((t for t in here if t.n_prompt), key=lambda t: t.n_prompt)
    decodes = sorted((t for t in here if t.n_gen), key=lambda t: t.n_gen)
    for name, found in (("pp", prefills), ("tg", decodes)):
        sizes = [str(t.n_prompt or t.n_gen) for t in found]
        if len(set(sizes)) > 1:
            notes.append(f"{label}: {name}{f', {name}'.join(sizes)} at depth {depth}: the longest is shown")
    return Point(
        depth=depth,
        prefill_tps=_stat(prefills[-1]) if prefills else None,
        decode_tps=_stat(decodes[-1]) if decodes else None,
    )


def _stat(test: Test) -> Stat:
    return Stat.of(test.samples_ts) if test.samples_ts else Stat((), *[test.avg_ts] * 3)


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
