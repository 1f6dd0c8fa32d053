"""Decode and prefill beside other work on the same cores, with llama.cpp's threads set up in several ways.

    python benchmarks/busy/run.py MODEL.gguf -o benchmarks/results/busy.json        (a quiet machine; under 5 minutes)

llama-cpp-python's ggml is built with OpenMP: its threads meet at GOMP_barrier, and how they wait there is libgomp's
affair (GOMP_SPINCOUNT, OMP_WAIT_POLICY, read when it is loaded), not that of ggml's own thread pool and its polling
level, which such a build leaves alone. So each variant is an environment and a number of threads for an engine's
process.

All engines are open at once, with the same tokens in the cache. For every number of neighbours (processes that count,
one thread each, at the usual priority) the variants take turns, so that drift hits all alike. A sample stops after
SAMPLE_S seconds or N_TOKENS tokens, and its rate is of the tokens that it got to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgekv import __version__
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.host.load import LoadMeter, load_now
from edgekv.host.threads import allowed_cpus, default_threads

NEIGHBOURS = (0, 1, 2, 4)
N_TOKENS, N_PROMPT, SAMPLE_S = 24, 64, 2.5
SPIN = "GOMP_SPINCOUNT"
BUSY = "x = 0\nwhile True: x += 1"


@dataclass(frozen=True)
class Variant:
    """One way to run the engine; `nice` other than 0 takes root rights."""

    name: str
    threads: int
    environment: dict[str, str]
    nice: int = 0


def variants(threads: int) -> list[Variant]:
    """The stock setting and what may do better."""
    found = [Variant("stock", threads, {SPIN: "300000"})]  # libgomp's own
    found += [Variant(f"spin {n}", threads, {SPIN: str(n)}) for n in (100, 1000, 10_000)]
    found += [Variant("passive", threads, {"OMP_WAIT_POLICY": "passive"})]
    if threads > 1:
        found.append(Variant(f"{threads - 1} of {threads} threads", threads - 1, {}))  # nobody waits for it
    if os.geteuid() == 0:
        found.append(Variant("nice -5", threads, {SPIN: "300000"}, nice=-5))
    return found


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of this process, which an engine's process gets when it starts."""
    before = {name: os.environ.get(name) for name in (SPIN, "OMP_WAIT_POLICY")}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def opened(variant: Variant, model: Path, depth: int) -> IsolatedBackend:
    """An engine with `depth` tokens in its cache."""
    with environment(variant.environment):
        engine = IsolatedBackend(model, n_ctx=depth + 256, n_threads=variant.threads)
    engine.prefill([i % 1000 + 10 for i in range(depth)])
    if variant.nice:
        for task in Path(f"/proc/{engine.pid}/task").iterdir():  # threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, int(task.name), variant.nice)
    return engine


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that each keep one core busy."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def decode_tps(engine: IsolatedBackend, depth: int) -> float:
    """Tokens per second of single tokens at a depth."""
    engine.decode(100)
    start, count = time.perf_counter(), 0
    while count < N_TOKENS and time.perf_counter() - start < SAMPLE_S:
        engine.decode(101)
        count += 1
    seconds = time.perf_counter() - start
    engine.trim(depth)
    return count / seconds


def prefill_tps(engine: IsolatedBackend, depth: int) -> float:
    """Tokens per second of a short prompt behind a depth."""
    start = time.perf_counter()
    engine.prefill(list(range(200, 200 + N_PROMPT)))
    seconds = time.perf_counter() - start
    engine.trim(depth)
    return N_PROMPT / seconds


def measure(
    engines: dict[str, IsolatedBackend], depth: int, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row of figures for each variant, and notes on what others took of the CPUs."""
    rows: dict[str, dict[str, Any]] = {name: {"variant": name} for name in engines}
    notes = []
    for count in NEIGHBOURS:
        samples: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in engines}
        meter = LoadMeter([engine.pid for engine in engines.values()])
        with neighbours(count):
            for _ in range(rounds):
                for name, engine in engines.items():
                    samples[name]["decode"].append(decode_tps(engine, depth))
                    samples[name]["prefill"].append(prefill_tps(engine, depth))
            load = meter.read()
        if load:
            notes.append(f"Beside {count}: {load.words()}.")
        for name, found in samples.items():
            rows[name] |= {f"{kind}_{count}": spread(values) for kind, values in found.items()}
            print(f"beside {count}  {name:<18}", {kind: spread(values) for kind, values in found.items()})
    return list(rows.values()), notes


def spread(values: list[float]) -> dict[str, float]:
    """A figure as benchmarks/results/README.md has it."""
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 1) for name, value in figures.items()}


def result(
    wanted: argparse.Namespace, chosen: list[Variant], rows: list[Any], notes: list[str]
) -> dict[str, Any]:
    """The file for benchmarks/results."""
    command = f"python benchmarks/busy/run.py {wanted.model.name} -d {wanted.depth} -r {wanted.rounds}"
    columns = [{"key": "variant", "title": f"threads at a depth of {wanted.depth}"}]
    columns += [
        {"key": f"{kind}_{count}", "title": f"{kind} t/s {f'beside {count}' if count else 'alone'}"}
        for kind in ("decode", "prefill")
        for count in NEIGHBOURS
    ]
    settings = [
        f"{v.name}: {v.threads} threads, {v.environment or 'nothing'} set, priority {v.nice}." for v in chosen
    ]
    return {
        "title": "llama.cpp beside other work on the same cores, by how its threads wait",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": None,
        "machine": f"{platform.machine()}, {len(allowed_cpus())} CPUs",
        "versions": {"edgekv": __version__, "llama-cpp-python": version("llama-cpp-python")},
        "command": [command],
        "columns": columns,
        "rows": rows,
        "notes": " ".join(
            [*settings, f"Median (lowest-highest) of {wanted.rounds} samples in turns.", *notes]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("-d", "--depth", type=int, default=512)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    wanted = parser.parse_args()
    if (load := load_now(2.0)) and load.busy:
        print(
            f"warning: {load.words()}: the figures of 0 neighbours will not be a quiet machine's",
            file=sys.stderr,
        )
    chosen = variants(wanted.threads)
    with contextlib.ExitStack() as stack:
        engines = {variant.name: opened(variant, wanted.model, wanted.depth) for variant in chosen}
        for engine in engines.values():
            stack.callback(engine.close)
        rows, notes = measure(engines, wanted.depth, wanted.rounds)
    if wanted.output:
        wanted.output.write_text(json.dumps(result(wanted, chosen, rows, notes), indent=1) + "\n")


if __name__ == "__main__":
    main()
