"""Fit of the speed model's coefficients on public measurements, and errors on rows that the fit never saw.

The rows are public_rows.csv beside this file: one measurement per line with its source, marked `train` or `test`.
Each kind of machine is fitted on its train rows alone; mean |log(predicted / measured)| is what is minimized,
so that one bad row weighs no more than it should.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edgekv.devices.boards.profile import Board, load_boards
from edgekv.devices.predict.speed import Coefficients, Workload, decode_s, prefill_s, weight_family

ROWS = Path(__file__).with_name("public_rows.csv")

# Where each kind starts, and which of its decode coefficients its train rows determine.
ARM_FREE = ("bandwidth_share", "decode_flops_per_cycle", "low_bit_cost")
FREE: Mapping[str, tuple[str, ...]] = {
    "arm": ("bandwidth_share",),  # its rows are all limited by bandwidth
    "arm-dotprod": ARM_FREE,
    "x86": ("bandwidth_share", "layer_s", "gqa f16"),
    "igpu": ("bandwidth_share", "layer_s", "low_bit_cost"),
    "gpu": ("bandwidth_share", "layer_s", "attention_passes"),
    "gpu-hbm": ("bandwidth_share", "layer_s", "attention_passes"),
}
ATTENTION = {"gqa f16": 1.15, "gqa quantized": 3.4, "mla f16": 4.8, "mla quantized": 5.3}  # FLOPs per cycle
FAMILIES = ("f16", "q8", "q4", "k", "low")


@dataclass(frozen=True)
class Row:
    """One published measurement; a speed of None was not measured."""

    board: Board
    threads: int
    model: str
    work: Workload
    mean_depth: float
    decode_tps: float | None
    n_prompt: int
    prefill_tps: float | None
    train: bool
    source: str


@dataclass(frozen=True)
class Error:
    """Predicted against measured for one row; `error` is predicted / measured - 1."""

    row: Row
    predicted_tps: float
    measured_tps: float

    @property
    def error(self) -> float:
        return self.predicted_tps / self.measured_tps - 1


def load_rows(path: Path) -> list[Row]:
    """The public rows; their boards must have profiles."""
    boards = load_boards()
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(line, boards) for line in csv.DictReader(file)]


def _row(line: dict[str, str], boards: Mapping[str, Board]) -> Row:
    work = Workload(
        n_layers=int(line["n_layers"]),
        weight_flops=float(line["weight_flops"]),
        read_nbytes=float(line["read_nbytes"]),
        weights=line["weights"],
        cache_nbytes=float(line["cache_nbytes"]),
        attention_flops=float(line["attention_flops"]),
        cache_type=line["cache_type"],
    )
    return Row(
        board=boards[line["board"]],
        threads=int(line["threads"]),
        model=line["model"],
        work=work,
        mean_depth=float(line["mean_depth"]),
        decode_tps=float(line["decode_tps"]) if line["decode_tps"] else None,
        n_prompt=int(line["n_prompt"] or 0),
        prefill_tps=float(line["prefill_tps"]) if line["prefill_tps"] else None,
        train=line["split"] == "train",
        source=f"{line['source']} {line['path']}",
    )


def fit(rows: Sequence[Row]) -> dict[str, Coefficients]:
    """Coefficients of every kind from its train rows."""
    return {kind: _fit_kind(kind, [r for r in rows if r.train and r.board.kind == kind]) for kind in FREE}


def _fit_kind(kind: str, rows: Sequence[Row]) -> Coefficients:
    c = _start(kind)
    c = _search(c, FREE[kind], lambda c: _loss([e.error for e in decode_errors(rows, {kind: c})]))
    rates = dict(c.prefill_flops_per_cycle) | ({} if rows[0].board.is_gpu else _prefill_rates(rows))
    c = replace(c, prefill_flops_per_cycle=rates)
    share, quantized = _prefill_attention(rows)
    c = replace(c, prefill_attention_share=share or c.prefill_attention_share)
    return replace(c, quantized_prefill_cost=quantized or c.quantized_prefill_cost)


def _start(kind: str) -> Coefficients:
    """Before fitting. What `assumed` names stays as it is here, for want of public figures.

    Attention over other caches than GQA in f16 follows ratios measured with SmolLM2-135M and its conversion
    on one AVX-512 core, depth 0 to 3072: GQA q8_0 takes 0.34 of the time of f16, MLA does 4.2 times the FLOPs
    per second in f16 (its rows are long and all heads share them), and q8_0 gains 10 % there. Arm takes the x86
    rates, half of them without fp16 arithmetic (128-bit vectors, every f16 value is converted).
    """
    is_gpu, dotprod = kind in ("igpu", "gpu", "gpu-hbm"), kind == "arm-dotprod"
    attention = {kernel: rate * (0.5 if kind == "arm" else 1.0) for kernel, rate in ATTENTION.items()}
    compute = ("decode_flops_per_cycle", "low_bit_cost", "prefill_attention_share", "quantized_prefill_cost")
    assumed = {
        "arm": (*compute, "attention_flops_per_cycle"),
        "arm-dotprod": ("attention_flops_per_cycle",),
        "x86": (*compute, "attention_flops_per_cycle but for gqa f16", "prefill_flops_per_cycle"),
        "igpu": ("attention_passes", "prefill_attention_share"),
    }
    return Coefficients(
        bandwidth_share=0.8,
        layer_s=0.0 if kind.startswith("arm") else 1e-4,
        decode_flops_per_cycle=0.0 if is_gpu else (12.0 if dotprod or kind == "x86" else 3.5),
        low_bit_cost=1.5 if not kind.startswith("gpu") else 1.0,
        attention_flops_per_cycle={} if is_gpu else attention,
        attention_passes=2.0 if is_gpu else 0.0,
        prefill_flops_per_cycle={} if is_gpu else {f: 3.5 if kind == "arm" else 12.0 for f in FAMILIES},
        prefill_attention_share=0.4,
        quantized_prefill_cost=1.0 if is_gpu else 3.0,
        assumed=assumed.get(kind, ()),
    )


def _prefill_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Median FLOPs per cycle and core of each weight family, from short prefills (attention hardly counts)."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        if row.prefill_tps and row.n_prompt <= 512:
            cycles = row.threads * row.board.clock_ghz * 1e9
            rate = row.prefill_tps * row.work.weight_flops / cycles
            seen.setdefault(weight_family(row.work.weights), []).append(rate)
    return {family: round(statistics.median(rates), 4) for family, rates in seen.items()}


def _prefill_attention(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Rate of attention in prefill as a share of the weights' rate, and the cost of a quantized cache.

    One source's prefills of growing length give a line: time per token = weights / rate + depth x attention /
    (rate x share). Its slope over its intercept holds no clock, no cores and no rate. A quantized cache
    steepens the line of the same model.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.prefill_tps and row.n_prompt >= 512:
            groups.setdefault((row.board.key, row.model, row.work.weights), []).append(row)
    shares, costs = [], []
    for group in groups.values():
        plain = [
            (r.n_prompt / 2, 1 / r.prefill_tps) for r in group if r.prefill_tps and not r.work.quantized_cache
        ]
        if len({depth for depth, _ in plain}) < 2:
            continue
        slope, intercept = statistics.linear_regression(*zip(*plain, strict=True))
        if slope > 0:
            work = group[0].work
            shares.append(work.attention_flops / work.weight_flops * intercept / slope)
            costs += [
                (1 / r.prefill_tps - intercept) / (r.n_prompt / 2 * slope)
                for r in group
                if r.prefill_tps and r.work.quantized_cache
            ]
    return _median(shares), _median(costs)


def _median(values: Sequence[float]) -> float | None:
    return float(f"{statistics.median(values):.4g}") if values else None


def _search(c: Coefficients, free: Sequence[str], loss: Callable[[Coefficients], float]) -> Coefficients:
    """Coordinate search over factors, a whole line at a time, since a `max` in the model makes plateaus.

    No gradient, no dependency, and the same result every time.
    """
    best = loss(c)
    for width in (2.0, 0.5, 0.1, 0.02):  # of the line, in e-folds to either side
        better = True
        while better:
            better = False
            for name in free:
                tried = [_scaled(c, name, math.exp(width * k / 20)) for k in range(-20, 21)]
                losses = [loss(candidate) for candidate in tried]
                if min(losses) < best - 1e-9:
                    best, c, better = min(losses), tried[losses.index(min(losses))], True
    for name in free:
        value = _value(c, name)
        c = _scaled(c, name, float(f"{value:.4g}") / value)
    return c


def _value(c: Coefficients, name: str) -> float:
    found: float = c.attention_flops_per_cycle[name] if name in ATTENTION else getattr(c, name)
    return found


def _scaled(c: Coefficients, name: str, factor: float) -> Coefficients:
    """`c` with one coefficient times `factor`; `name` is a field or a kind of attention."""
    if name in ATTENTION:
        rates = {**c.attention_flops_per_cycle, name: _value(c, name) * factor}
        return replace(c, attention_flops_per_cycle=rates)
    changed: dict[str, Any] = {name: _value(c, name) * factor}
    return replace(c, **changed)


def _loss(errors: Sequence[float]) -> float:
    return statistics.fmean(abs(math.log1p(error)) for error in errors)


def decode_errors(rows: Sequence[Row], coefficients: Mapping[str, Coefficients]) -> list[Error]:
    """Errors of decode speed, of the rows that have it."""
    found = []
    for row in rows:
        if row.decode_tps:
            c = coefficients[row.board.kind]
            seconds = decode_s(row.work, row.board, row.threads, row.mean_depth, c)
            found.append(Error(row, 1 / seconds, row.decode_tps))
    return found


def prefill_errors(rows: Sequence[Row], coefficients: Mapping[str, Coefficients]) -> list[Error]:
    """Errors of prefill speed on an empty cache, of the rows that have it."""
    found = []
    for row in rows:
        if row.prefill_tps:
            c = coefficients[row.board.kind]
            seconds = prefill_s(row.work, row.board, row.threads, row.n_prompt, 0, c)
            if seconds:
                found.append(Error(row, row.n_prompt / seconds, row.prefill_tps))
    return found


def summary(errors: Sequence[Error]) -> tuple[float, float]:
    """Median and worst |error|."""
    sizes = [abs(error.error) for error in errors]
    return statistics.median(sizes), max(sizes)
