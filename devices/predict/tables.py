"""Tables of plans, and projected reports that `edgekv compare` puts beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import replace

from edgekv.devices.boards.profile import Board, load_boards
from edgekv.devices.predict.choices import Option
from edgekv.devices.predict.model_info import describe_cache
from edgekv.devices.predict.plan import MIB, PROMPT, Plan, SpeedAt
from edgekv.devices.reporting.report import (
    FORMAT,
    VERSION,
    BenchRun,
    CoreGroup,
    Machine,
    Memory,
    ModelInfo,
    Point,
    Report,
    Settings,
    Stat,
)
from edgekv.devices.reporting.text_table import UNKNOWN, Table, mebibytes, seconds, whole
from edgekv.devices.sensors.machine import software
from edgekv.quant.formats import KEEP


def memory_lines(plan: Plan) -> list[str]:
    """The memory of one plan, one line per part."""
    parts = plan.footprint
    runs_on_card = plan.board.kind.startswith("gpu")
    rows = [
        ("weights", parts.weights_nbytes),
        (f"cache, {plan.option.cache_type}, {plan.context:,} tokens", parts.cache_nbytes),
        ("compute buffers", parts.compute_nbytes),
        *([] if runs_on_card else [("runtime", parts.runtime_nbytes)]),
        ("system", plan.ram_nbytes - plan.available_nbytes),
    ]
    total = sum(size for _, size in rows)
    spare = plan.available_nbytes - plan.needed_nbytes
    verdict = (
        f"fits, {mebibytes(spare)} to spare" if plan.fits else f"does not fit: {mebibytes(-spare)} too much"
    )
    lines = [f"  {name:<34}{mebibytes(size):>14}" for name, size in rows]
    lines.append(f"  {'total of ' + mebibytes(plan.ram_nbytes):<34}{mebibytes(total):>14}  {verdict}")
    trained = plan.option.spec.context_length
    lines.append(f"  longest context that fits: {plan.max_context:,} (the model was trained for {trained:,})")
    lines.append(f"  sessions of {plan.context:,} tokens at once: {plan.sessions:,}")
    return lines


def speed_table(plan: Plan) -> Table:
    """Predicted speed by depth."""
    rows = [
        {
            "tokens in the cache": f"{speed.depth:,}",
            "decode t/s": f"{speed.decode_tps:.3g}",
            f"prefill t/s ({PROMPT})": short(speed.prefill_tps),
            f"TTFT ({PROMPT})": seconds(speed.ttft_s),
            **({} if plan.board.is_gpu else _with_kernel(speed)),
        }
        for speed in plan.speeds
    ]
    plural = "" if plan.threads == 1 else "s"
    where = "" if plan.board.is_gpu else f", {plan.threads} thread{plural}"
    return Table.of(f"Speed{where} (projected)", "tokens in the cache", rows)


def _with_kernel(speed: SpeedAt) -> dict[str, str]:
    """The same with EdgeKV's attention kernel."""
    return {
        "with the kernel: decode": short(speed.kernel_decode_tps),
        "prefill": short(speed.kernel_prefill_tps),
        "TTFT": seconds(speed.kernel_ttft_s),
    }


def plans_table(title: str, plans: Sequence[Plan], first: str) -> Table:
    """One row per plan; `first` names the first column: "board" or "option"."""
    rows = [
        {
            first: plan.board.name if first == "board" else plan.option.label,
            "RAM": mebibytes(plan.ram_nbytes),
            "needs": mebibytes(plan.needed_nbytes),
            "fits": "yes" if plan.fits else "no",
            "longest context": whole(plan.max_context),
            "sessions": whole(plan.sessions),
            "decode t/s": f"{plan.speeds[0].decode_tps:.3g}",
            "at depth": f"{plan.speeds[-1].decode_tps:.3g}",
            "kernel, at depth": short(plan.speeds[-1].kernel_decode_tps),
            "prefill t/s": short(plan.speeds[0].prefill_tps),
            "t/J": f"{plan.tokens_per_joule:.2g}" if plan.tokens_per_joule else UNKNOWN,
        }
        for plan in plans
    ]
    return Table.of(title, first, rows)


def boards_table() -> Table:
    """Every profile."""
    rows = [
        {
            "board": board.key,
            "name": board.name,
            "kind": board.kind,
            "RAM": " ".join(f"{ram / 1024:g}" for ram in board.ram_mib) + " GB",
            "read GB/s": f"{max(board.read_gb_s.values()):g}",
            "system MiB": str(board.os_mib),
            "W": f"{board.decode_w:g}" if board.decode_w else UNKNOWN,
        }
        for board in load_boards().values()
    ]
    return Table.of("Boards", "board", rows)


def short(value: float | None) -> str:
    """Three digits of a figure."""
    return f"{value:.3g}" if value else UNKNOWN


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as values for JSON."""
    parts = plan.footprint
    return {
        "provenance": "projected",
        "board": plan.board.key,
        "board_name": plan.board.name,
        "option": list(plan.option.steps),
        "cache_type": plan.option.cache_type,
        "context": plan.context,
        "ram_nbytes": plan.ram_nbytes,
        "available_nbytes": plan.available_nbytes,
        "needed_nbytes": plan.needed_nbytes,
        "weights_nbytes": parts.weights_nbytes,
        "cache_nbytes": parts.cache_nbytes,
        "compute_nbytes": parts.compute_nbytes,
        "runtime_nbytes": parts.runtime_nbytes,
        "fits": plan.fits,
        "max_context": plan.max_context,
        "sessions": plan.sessions,
        "threads": plan.threads,
        "speeds": [asdict(speed) for speed in plan.speeds],
        "tokens_per_joule": plan.tokens_per_joule,
        "notes": list(plan.notes),
        "sources": dict(plan.board.sources),
    }


def projected_report(plans: Sequence[Plan], model: ModelInfo, command: str) -> Report:
    """A report of plans for one board, marked as projected in every part."""
    board, ram_nbytes = plans[0].board, plans[0].ram_nbytes
    assert all(plan.board == board for plan in plans)
    return Report(
        format=FORMAT,
        version=VERSION,
        provenance="projected",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=_machine(board, ram_nbytes),
        software=replace(software(), llama_cpp=None),
        settings=Settings(
            n_prompt=PROMPT,
            n_gen=1,
            repeats=0,
            depths=tuple(speed.depth for speed in plans[0].speeds),
            threads=plans[0].threads,
            cpus=(),
            turns=False,
        ),
        runs=tuple(_run(plan, model) for plan in plans),
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
    )


def _machine(board: Board, ram_nbytes: int) -> Machine:
    return Machine(
        board=board.name,
        soc=board.soc,
        arch=board.kind,
        cores=(CoreGroup(tuple(range(board.cores)), board.soc, board.clock_ghz * 1000),),
        isa_flags=board.isa,
        ram_nbytes=ram_nbytes,
        available_nbytes=max(0, ram_nbytes - board.os_mib * MIB),
        memory_type=board.memory,
        kernel="not run",
    )


def _model(option: Option, original: ModelInfo) -> ModelInfo:
    work = option.workload()
    return replace(
        original,
        arch=option.spec.arch,
        attention=option.spec.layers[0].attention.kind,
        sha256=None if option.keep or option.weights != KEEP else original.sha256,
        quantization=option.quantization,
        weights_nbytes=option.weights_nbytes,
        read_nbytes=option.read_nbytes,
        flops=round(work.weight_flops),
        flops_per_cached_token=round(work.attention_flops),
    )


def _run(plan: Plan, model: ModelInfo) -> BenchRun:
    option, parts, work = plan.option, plan.footprint, plan.option.workload()
    return BenchRun(
        label=f"{model.name}: {option.label}",
        engine="projection",
        model=_model(option, model),
        cache=describe_cache(option.spec, option.cache_type, plan.context),
        points=tuple(
            Point(
                depth=speed.depth,
                ttft_s=Stat.of([speed.ttft_s]) if speed.ttft_s else None,
                prefill_tps=Stat.of([speed.prefill_tps]) if speed.prefill_tps else None,
                decode_tps=Stat.of([speed.decode_tps]),
                decode_j_per_token=plan.board.decode_w / speed.decode_tps if plan.board.decode_w else None,
                decode_nbytes=round(
                    work.read_nbytes + option.workload(speed.depth).cache_nbytes * speed.depth
                ),
            )
            for speed in plan.speeds
        ),
        memory=Memory(
            peak_rss_nbytes=parts.rss_nbytes,
            weights_nbytes=parts.weights_nbytes,
            cache_nbytes=parts.cache_nbytes,
            compute_nbytes=parts.compute_nbytes,
            other_nbytes=parts.runtime_nbytes,
        ),
    )
