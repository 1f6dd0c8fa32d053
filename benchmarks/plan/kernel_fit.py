"""The coefficients of devices/predict/kernel.json from a result of benchmarks/kernel_speed.py, and every row's error.

    python benchmarks/plan/kernel_fit.py benchmarks/results/kernel-zen4.json --clock-ghz 3.67 --read-gb-s 33 \
        --model original=MODEL.gguf --model 192+64=SMALL.gguf ... --machine '2 cores of an AMD EPYC (Zen 4)'

Attention's time is a measured token's time less that of the same model without a cache: measured at depth 0 where the
result has such a row, else as `edgekv plan` projects it. Cost per FLOP (by kind of attention) and per cached value (by
cache type) are the least squares of relative errors over decode and prefill. A row is projected twice: by the fit on
all rows, and by one without the rows of its model and cache type, where others have that type.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from edgekv.devices.boards.profile import Board, load_boards
from edgekv.devices.predict.choices import option
from edgekv.devices.predict.kernel import COEFFICIENTS, f16_or_name, load_kernel_coefficients, shared_by
from edgekv.devices.predict.speed import load_coefficients, prefill_weights_s, weights_s
from edgekv.documents import dumps
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant.formats import KEEP

THREADS, PREFILLED = 2, 64  # kernel_speed.py's


@dataclass(frozen=True)
class Sample:
    """A measured time per token, and what it is made of: `base_s` without attention, FLOPs, and values read."""

    label: str
    case: tuple[str, str]
    kind: str
    cache_type: str
    measured_s: float
    base_s: float
    flops: float
    values: float


def samples(rows: list[dict[str, Any]], models: dict[str, Path], board: Board) -> Iterator[Sample]:
    """Decode and prefill of every row with a cache."""
    c = load_coefficients()["x86"]
    for row in rows:
        depth, cache = row["depth"], row["cache"]
        if not depth:
            continue
        work = option(GGUFSource(models[row["model"]]), None, cache, KEEP).workload(depth)
        empty = next((r for r in rows if not r["depth"] and same(r, row)), None)
        modelled = {
            "decode": weights_s(work, board, THREADS, c),
            "prefill": prefill_weights_s(work, board, THREADS, c),
        }
        for measure, n in (("decode", 1), ("prefill", PREFILLED)):
            base = 1 / empty[f"{measure}_edgekv"]["median"] if empty else modelled[measure]
            assert base is not None
            mean = depth + n / 2
            yield Sample(
                f"{row['model']} {cache} {measure} at {depth}",
                (row["model"], cache),
                "mla" if work.latent else "gqa",
                f16_or_name(cache),
                1 / row[f"{measure}_edgekv"]["median"],
                base,
                mean * work.attention_flops,
                mean * work.cache_values / shared_by(n, work.group),
            )


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["model"] == b["model"] and a["cache"] == b["cache"])


def fitted(found: list[Sample], core_hz: float) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs per cycle by kind and cycles per value by cache type."""
    kinds, types = sorted({s.kind for s in found}), sorted({s.cache_type for s in found})
    table = np.zeros((len(found), len(kinds) + len(types)))
    for i, s in enumerate(found):
        table[i, kinds.index(s.kind)] = s.flops / s.measured_s
        table[i, len(kinds) + types.index(s.cache_type)] = s.values / s.measured_s
    wanted = np.array([max(0.0, s.measured_s - s.base_s) / s.measured_s for s in found])
    costs = positive_least_squares(table, wanted)
    flops = {kind: 1 / (core_hz * max(cost, 1e-15)) for kind, cost in zip(kinds, costs, strict=False)}
    return flops, {name: core_hz * cost for name, cost in zip(types, costs[len(kinds) :], strict=True)}


def error(s: Sample, flops: dict[str, float], cycles: dict[str, float], core_hz: float) -> float:
    """How much faster than measured a fit projects a sample, as a share."""
    seconds = s.base_s + (s.flops / flops[s.kind] + s.values * cycles[s.cache_type]) / core_hz
    return s.measured_s / seconds - 1


def positive_least_squares(table: Any, wanted: Any) -> Any:
    """The best x >= 0 of table @ x = wanted, by coordinate descent."""
    scale = np.linalg.norm(table, axis=0)
    a, x = table / scale, np.zeros(table.shape[1])
    for _ in range(20_000):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + a[:, i] @ (wanted - a @ x))
    return x / scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--clock-ghz", type=float, required=True)
    parser.add_argument("--read-gb-s", type=float, required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--write", action="store_true", help="into kernel.json")
    options = parser.parse_args()
    board = next(board for board in load_boards().values() if board.kind == "x86")
    board = board_of(board, options.clock_ghz, options.read_gb_s)
    models = {name: Path(file) for name, _, file in (text.partition("=") for text in options.model)}
    found = list(samples(json.loads(options.result.read_text())["rows"], models, board))
    flops, cycles = fitted(found, THREADS * options.clock_ghz * 1e9)
    core_hz = THREADS * options.clock_ghz * 1e9
    unseen = []
    for s in found:
        line = f"{s.label}: {1 / s.measured_s:.1f} measured, {error(s, flops, cycles, core_hz):+.0%} of the fit on all"
        others = [other for other in found if other.case != s.case]
        if s.cache_type in {other.cache_type for other in others}:
            unseen.append(error(s, *fitted(others, core_hz), core_hz))
            line += f", {unseen[-1]:+.0%} of one that did not see it"
        print(line)
    if unseen:
        print(
            f"median of {len(unseen)} unseen: {np.median(np.abs(unseen)):.1%}, worst {np.max(np.abs(unseen)):.1%}"
        )
    quantized = [value for name, value in cycles.items() if name != "f16"]
    about = load_kernel_coefficients()
    about["x86"] = replace(
        about["x86"],
        flops_per_cycle=rounded(flops),
        cycles_per_value=rounded(cycles | {"quantized": max(quantized)}),
        source=f"fitted on runs of one machine, {options.machine}",
    )
    print(dumps(about, indent=1))
    if options.write:
        COEFFICIENTS.write_text(dumps(about, indent=1) + "\n", encoding="utf-8")


def board_of(board: Board, clock_ghz: float, gb_s: float) -> Board:
    import dataclasses

    return dataclasses.replace(board, clock_ghz=clock_ghz, read_gb_s={THREADS: gb_s})


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


if __name__ == "__main__":
    main()
