"""llama-bench's JSON (`llama-bench -o json`) read as a report, so that anyone's results compare.

Fields: ggml-org/llama.cpp tools/llama-bench/llama-bench.cpp, `test::get_fields`. Builds before mid 2025 have
no n_depth; none tells TTFT, memory, temperature or power, and on Arm the CPU is just "CPU".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

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

Test = dict[str, Any]
NEEDED: dict[str, type | tuple[type, ...]] = {
    "model_filename": str,
    "n_prompt": int,
    "n_gen": int,
    "avg_ts": (int, float),
}


def looks_like_llama_bench(value: Any) -> bool:
    """A list of objects that name a model file."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and "model_filename" in value[0]
    )


def parse_llama_bench(value: Any, path: Path) -> Report:
    """A Report from the parsed JSON of llama-bench; tests of prompt and answer together are left out.

    Raises:
        InputError: an entry lacks what every build writes, or holds another kind of value.
    """
    tests = [_checked(test, i, path) for i, test in enumerate(value)]
    notes = ["read from llama-bench: TTFT, memory, temperature and energy were not measured"]
    used = [test for test in tests if not (test["n_prompt"] and test["n_gen"])]
    if len(used) < len(tests):
        notes.append(f"{len(tests) - len(used)} tests of prompt and answer together are left out")
    if not used:
        raise InputError(f"{path}: no test of prefill or decode alone; run llama-bench with -p and -n")
    groups: dict[tuple[str, ...], list[Test]] = {}
    for test in used:
        groups.setdefault(_key(test), []).append(test)
    first = used[0]
    return Report(
        format=FORMAT,
        version=VERSION,
        provenance="measured",
        created=str(first.get("test_time", "unknown")),
        command="llama-bench",
        machine=_machine(first),
        software=Software(llama_cpp=f"build {first.get('build_commit', 'unknown')}"),
        settings=_settings(used),
        runs=tuple(_run(key, group, notes) for key, group in groups.items()),
        notes=tuple(notes),
    )


def _checked(test: Any, index: int, path: Path) -> Test:
    if not isinstance(test, dict):
        raise InputError(
            f"{path}: entry {index} is not an object; is this the output of llama-bench -o json?"
        )
    for name, kind in NEEDED.items():
        if not isinstance(test.get(name), kind) or isinstance(test.get(name), bool):
            raise InputError(f"{path}: entry {index}: {name} is {test.get(name)!r}; the file is damaged")
    if not test["avg_ts"] > 0 or test["n_prompt"] < 0 or test["n_gen"] < 0 or _depth(test) < 0:
        raise InputError(
            f"{path}: entry {index}: no speed or size can be negative or zero; the file is damaged"
        )
    return cast(Test, test)


def _key(test: Test) -> tuple[str, ...]:
    """What makes two tests the same candidate."""
    names = ("model_filename", "type_k", "type_v", "n_threads", "n_gpu_layers", "flash_attn", "backends")
    return tuple(str(test.get(name, "")) for name in names)


def _depth(test: Test) -> int:
    depth = test.get("n_depth", 0)
    return depth if isinstance(depth, int) else 0


def _run(key: tuple[str, ...], tests: Sequence[Test], notes: list[str]) -> BenchRun:
    test = tests[0]
    file = Path(key[0]).name
    types = key[1] if key[1] == key[2] else f"{key[1]}/{key[2]}"
    label = f"{Path(file).stem} {types or 'f16'} t{key[3]}"
    if key[4] not in ("", "0", "-1"):
        label += f" ngl{key[4]}"
    words = str(test.get("model_type", "")).split()
    model = ModelInfo(
        file=file,
        name=str(test.get("model_type", file)),
        arch=words[0] if words else "unknown",
        n_params=_whole(test.get("model_n_params")),
        quantization=" ".join(words[2:]) or "unknown",
        weights_nbytes=_whole(test.get("model_size")),
    )
    return BenchRun(
        label=label,
        engine="llama-bench",
        model=model,
        cache=CacheInfo(types or "f16"),
        points=tuple(_point(depth, tests, label, notes) for depth in sorted({_depth(t) for t in tests})),
    )


def _point(depth: int, tests: Sequence[Test], label: str, notes: list[str]) -> Point:
    """One depth. Where several lengths were timed, the longest prefill and the longest decode count."""
    prefills = sorted(
        (t for t in tests if _depth(t) == depth and t["n_prompt"]), key=lambda t: int(t["n_prompt"])
    )
    decodes = sorted((t for t in tests if _depth(t) == depth and t["n_gen"]), key=lambda t: int(t["n_gen"]))
    for name, found in (("pp", prefills), ("tg", decodes)):
        sizes = [str(t["n_prompt"] or t["n_gen"]) for t in found]
        if len(set(sizes)) > 1:
            notes.append(f"{label}: {name}{f', {name}'.join(sizes)} at depth {depth}: the longest is shown")
    return Point(
        depth=depth,
        prefill_tps=_stat(prefills[-1]) if prefills else None,
        decode_tps=_stat(decodes[-1]) if decodes else None,
    )


def _stat(test: Test) -> Stat:
    samples = test.get("samples_ts")
    if isinstance(samples, list) and samples and all(isinstance(s, int | float) and s > 0 for s in samples):
        return Stat.of([float(sample) for sample in samples])
    mean = float(test["avg_ts"])
    return Stat((), mean, mean, mean)


def _machine(test: Test) -> Machine:
    gpu = str(test.get("gpu_info") or "")
    cpu = str(test.get("cpu_info") or "unknown CPU")
    return Machine(
        board=f"{gpu} on {cpu}" if gpu else cpu,
        arch="unknown",
        cores=(),
        isa_flags=(),
        kernel="unknown",
    )


def _settings(tests: Sequence[Test]) -> Settings:
    samples = [len(test["samples_ts"]) for test in tests if isinstance(test.get("samples_ts"), list)]
    return Settings(
        n_prompt=max(test["n_prompt"] for test in tests),
        n_gen=max(test["n_gen"] for test in tests),
        repeats=max(samples, default=0),
        depths=tuple(sorted({_depth(test) for test in tests})),
        threads=_whole(tests[0].get("n_threads")),
        cpus=(),
        turns=False,
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
