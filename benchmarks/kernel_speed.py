"""Decode and prefill speed with EdgeKV's attention kernel beside stock llama.cpp's: tokens/s at several depths.

    python benchmarks/kernel_speed.py --case original=MODEL.gguf:f16,q4_0 --case 192+64=SMALL.gguf:q4_0 -o RESULT.json

Both sides run in turns, each in a process of its own (a kernel that is loaded stays), on one and the same cache: the
kernel fills it once per depth, and each process loads those rows. Medians, lowest and highest of --rounds runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("stock", "edgekv")
MEASURES = ("decode", "prefill")


def measured(job: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of one run; fills the file of rows instead where it is not there."""
    from edgekv.backends.llama_cpp.backend import LlamaCppBackend

    depth, n_decoded, n_prefilled = job["depth"], job["decoded"], job["prefilled"]
    room = depth + max(n_decoded + 1, n_prefilled)
    engine = LlamaCppBackend(
        Path(job["model"]), n_ctx=room, cache_type=job["cache"], n_threads=job["threads"]
    )
    assert engine.kernel == os.environ["EDGEKV_KERNEL"]
    tokens = np.random.default_rng(0).integers(1000, engine.n_vocab, room).tolist()
    rows = Path(job["rows"])
    if depth and not rows.exists():
        engine.prefill(tokens[:depth])
        size = engine._api.llama_state_seq_get_size(engine._context, 0)
        data = ctypes.create_string_buffer(size)
        assert engine._api.llama_state_seq_get_data(engine._context, _bytes(data), size, 0) == size
        rows.write_bytes(data.raw)
        return {}
    if depth:
        stored = rows.read_bytes()
        data = ctypes.create_string_buffer(stored, len(stored))
        assert engine._api.llama_state_seq_set_data(engine._context, _bytes(data), len(stored), 0)
        engine.n_past = depth
    engine.decode(tokens[depth])  # the first one makes the graph
    start = time.perf_counter()
    for token in tokens[depth + 1 : depth + 1 + n_decoded]:
        engine.decode(token)
    decode = n_decoded / (time.perf_counter() - start)
    engine.trim(depth)
    start = time.perf_counter()
    engine.prefill(tokens[depth : depth + n_prefilled])
    return {"decode": decode, "prefill": n_prefilled / (time.perf_counter() - start)}


def _bytes(data: ctypes.Array[ctypes.c_char]) -> Any:
    return ctypes.cast(data, ctypes.POINTER(ctypes.c_uint8))


def child(job: dict[str, Any], kernel: str) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=os.environ | {"EDGEKV_KERNEL": kernel}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def rows_of_case(name: str, model: str, caches: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per cache type and depth."""
    rows = []
    for cache in caches.split(","):
        for depth in options.depths:
            with tempfile.TemporaryDirectory() as folder:
                job = {"model": model, "cache": cache, "depth": depth, "rows": f"{folder}/rows"}
                job |= {
                    "threads": options.threads,
                    "decoded": options.decoded,
                    "prefilled": options.prefilled,
                }
                if depth:
                    child(job, "edgekv")
                runs = [{side: child(job, side) for side in SIDES} for _ in range(options.rounds)]
            row: dict[str, Any] = {"model": name, "cache": cache, "depth": depth}
            for measure in MEASURES:
                for side in SIDES:
                    row[f"{measure}_{side}"] = spread([run[side][measure] for run in runs])
                ratios = [run["edgekv"][measure] / run["stock"][measure] for run in runs]
                row[f"{measure}_ratio"] = round(statistics.median(ratios), 2)
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, to three digits."""
    low, median, high = (float(f"{x:.3g}") for x in (min(values), statistics.median(values), max(values)))
    return {"median": median, "low": low, "high": high}


def main() -> None:
    """Measure every case and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", default=[], metavar="NAME=MODEL:TYPE,TYPE")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 2048, 7600])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decoded", type=int, default=8, help="tokens decoded per run")
    parser.add_argument("--prefilled", type=int, default=64, help="tokens prefilled per run, at once")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measured(options.job)))
        return
    rows: list[dict[str, Any]] = []
    for case in options.case:
        name, _, rest = case.partition("=")
        model, _, caches = rest.rpartition(":")
        rows += rows_of_case(name, model, caches, options)
        if options.output:
            options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
