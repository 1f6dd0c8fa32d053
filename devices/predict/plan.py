"""Plans: memory, longest context, speed, sessions and energy of a model on a board, all of them predicted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.backends.llama_cpp.footprint import (
    CELLS,
    MASK_NBYTES,
    RUNTIME_NBYTES,
    Footprint,
    default_ubatch,
    footprint,
)
from edgekv.devices.bench.bandwidth import working_set_nbytes
from edgekv.devices.bench.worker import WorkerProcess
from edgekv.devices.boards.profile import Board, match_board
from edgekv.devices.predict.choices import Option
from edgekv.devices.predict.kernel import kernel_decode_s, kernel_prefill_s, load_kernel_coefficients
from edgekv.devices.predict.speed import Coefficients, decode_s, load_coefficients, prefill_s, weight_family
from edgekv.devices.reporting.report import Machine
from edgekv.devices.sensors.machine import probe
from edgekv.errors import BackendError
from edgekv.host.proc import cpuinfo_blocks
from edgekv.host.threads import allowed_cpus, big_cores, default_threads

MIB = 2**20
PROMPT = 512  # tokens of the prompt that prefill speed and TTFT are given for


@dataclass(frozen=True)
class SpeedAt:
    """Predicted speed with `depth` tokens in the cache; prefill is unknown for some GPUs.

    The first three with llama.cpp's own attention, the others with EdgeKV's kernel, which GPUs do not run.
    """

    depth: int
    decode_tps: float
    prefill_tps: float | None
    ttft_s: float | None
    kernel_decode_tps: float | None = None
    kernel_prefill_tps: float | None = None
    kernel_ttft_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """One option on one board. All figures are projected."""

    board: Board
    option: Option
    ram_nbytes: int
    context: int
    threads: int
    footprint: Footprint
    available_nbytes: int
    max_context: int
    sessions: int
    speeds: tuple[SpeedAt, ...]
    tokens_per_joule: float | None
    notes: tuple[str, ...]

    @property
    def needed_nbytes(self) -> int:
        """Bytes that must stay in the board's memory; a discrete GPU's holds no Python."""
        host = self.footprint.runtime_nbytes if self.board.kind.startswith("gpu") else 0
        return self.footprint.needed_nbytes - host

    @property
    def fits(self) -> bool:
        """Whether it fits the memory that the system leaves."""
        return self.needed_nbytes <= self.available_nbytes


def make_plan(board: Board, option: Option, context: int, ram_nbytes: int, threads: int = 0) -> Plan:
    """Predict one option on one board with `ram_nbytes` of memory; `threads` 0: every core of the profile."""
    threads = threads or board.cores
    c = load_coefficients()[board.kind]
    ubatch = default_ubatch(ram_nbytes)
    parts = _footprint(board, option, context, ubatch)
    speeds = _speeds(board, option, context, threads, c)
    plan = Plan(
        board=board,
        option=option,
        ram_nbytes=ram_nbytes,
        context=context,
        threads=threads,
        footprint=parts,
        available_nbytes=max(0, ram_nbytes - board.os_mib * MIB),
        max_context=0,
        sessions=0,
        speeds=speeds,
        tokens_per_joule=speeds[0].decode_tps / board.decode_w if board.decode_w else None,
        notes=_notes(board, option, threads, c),
    )
    room = plan.available_nbytes - (
        plan.needed_nbytes - parts.cache_nbytes
    )  # sessions share all but the cache
    sessions = max(0, room // parts.cache_nbytes)
    return replace(plan, max_context=_max_context(plan, ubatch), sessions=sessions)


def _footprint(board: Board, option: Option, context: int, ubatch: int) -> Footprint:
    """Memory of one session with a full context."""
    model = (option.spec, option.weights_nbytes, option.cache_type)
    return footprint(*model, context, ubatch, runtime_nbytes=board.runtime_nbytes)


def _speeds(board: Board, option: Option, context: int, threads: int, c: Coefficients) -> tuple[SpeedAt, ...]:
    found = []
    for depth in sorted({0, context // 2, max(0, context - PROMPT)}):
        work = option.workload(depth)
        decode = decode_s(work, board, threads, depth, c)
        prefill = prefill_s(work, board, threads, PROMPT, depth, c)
        known = (PROMPT / prefill, prefill + decode) if prefill else (None, None)
        speed = SpeedAt(depth, 1 / decode, *known)
        k_decode = kernel_decode_s(work, board, threads, depth, c)
        k_prefill = kernel_prefill_s(work, board, threads, PROMPT, depth, c)
        if k_decode and k_prefill:
            speed = replace(
                speed,
                kernel_decode_tps=1 / k_decode,
                kernel_prefill_tps=PROMPT / k_prefill,
                kernel_ttft_s=k_prefill + k_decode,
            )
        found.append(speed)
    return tuple(found)


def _max_context(plan: Plan, ubatch: int) -> int:
    """The longest context that fits, in whole blocks of cells; 0 if not even one does."""

    def too_long(blocks: int) -> bool:
        parts = _footprint(plan.board, plan.option, blocks * CELLS, ubatch)
        return not replace(plan, footprint=parts).fits

    most = max(1, plan.available_nbytes // (MASK_NBYTES * CELLS))  # where every layer has a window
    return bisect_left(range(1, most + 1), True, key=too_long) * CELLS  # the need grows with the context


def _notes(board: Board, option: Option, threads: int, c: Coefficients) -> tuple[str, ...]:
    notes = []
    if c.assumed:
        names = ", ".join(name.replace("_", " ") for name in c.assumed)
        notes.append(f"no public figure backs these coefficients of {board.kind} machines: {names}")
    assumed = [name for name, source in board.sources.items() if source.startswith("assumption")]
    if assumed:
        notes.append(f"assumed in the profile of {board.name}: {', '.join(assumed)}")
    if kernel := load_kernel_coefficients().get(board.kind):
        notes.append(f"speeds with EdgeKV's kernel: {kernel.source}")
    if weight_family(option.quantization) == "low":
        notes.append("2- and 3-bit weights cost extra compute; the error is larger for them")
    if not board.is_gpu:
        work = option.workload()
        best = min(range(1, threads + 1), key=lambda n: decode_s(work, board, n, 0, c))
        gain = decode_s(work, board, threads, 0, c) / decode_s(work, board, best, 0, c) - 1
        if gain > 0.05:
            notes.append(
                f"with {best} of {threads} threads decoding would be {gain:.0%} faster (prefill slower)"
            )
    return tuple(notes)


def recommend(board: Board, options: Sequence[Option], context: int, ram_nbytes: int) -> list[Plan]:
    """Plans of all options that fit, the one with the least expected loss first; ties go to the faster."""
    plans = [make_plan(board, option, context, ram_nbytes) for option in options]
    fitting = [plan for plan in plans if plan.fits]
    return sorted(fitting, key=lambda plan: (plan.option.loss_order, -plan.speeds[-1].decode_tps))


def this_board(read_nbytes: int) -> tuple[Board, Machine]:
    """The machine at hand as a board: probed, its bandwidth measured now in a process of its own.

    Raises:
        BackendError: the bandwidth could not be measured.
    """
    machine, notes = probe()
    if machine.ram_nbytes is None or machine.available_nbytes is None:
        raise BackendError(f"this machine does not show its memory: {'; '.join(notes)}")
    cpus = tuple(big_cores(set(allowed_cpus())))
    threads = min(len(cpus), default_threads())
    nbytes = working_set_nbytes(read_nbytes, machine.available_nbytes)
    with WorkerProcess("this machine") as worker:
        gb_s = worker.ask("bandwidth", nbytes=nbytes, threads=threads, cpus=cpus)
    known = match_board(machine)
    clock_ghz, clock_source = _clock_ghz(machine, known)
    board = Board(
        key="this",
        name=machine.board,
        kind=machine_kind(machine),
        soc=machine.soc or machine.cores[0].name,
        memory=machine.memory_type or (known.memory if known else "unknown"),
        aliases=(),
        isa=machine.isa_flags,
        matches=(),
        ram_mib=(machine.ram_nbytes // MIB,),
        cores=threads,
        clock_ghz=clock_ghz,
        read_gb_s={threads: gb_s},
        os_mib=(machine.ram_nbytes - machine.available_nbytes) // MIB,
        decode_w=known.decode_w if known else None,
        sources={
            "ram_mib": "measured now",
            "read_gb_s": f"measured now: {nbytes // MIB} MiB read by {threads} threads",
            "os_mib": "measured now: what is not available",
            "cores": "measured now",
            "clock_ghz": clock_source,
        },
        runtime_nbytes=measured_runtime_nbytes(),
    )
    return board, machine


def measured_runtime_nbytes() -> int:
    """Bytes that a process holds on this machine before any model; the usual figure where llama.cpp is missing."""
    with WorkerProcess("this machine") as worker:
        try:
            return int(worker.ask("runtime"))
        except BackendError:
            return RUNTIME_NBYTES


def machine_kind(machine: Machine) -> str:
    """The kind of this CPU: a key of the coefficients."""
    if machine.arch.startswith(("aarch64", "arm")):
        return "arm-dotprod" if "asimddp" in machine.isa_flags else "arm"
    return "x86"


def _clock_ghz(machine: Machine, known: Board | None) -> tuple[float, str]:
    """The clock of the fastest cores, and where the figure comes from."""
    if machine.cores[0].max_mhz:
        return machine.cores[0].max_mhz / 1000, "measured now"
    shown = [block.get("cpu mhz") for block in cpuinfo_blocks(Path("/")).values()]
    clock_ghz = max((float(mhz) / 1000 for mhz in shown if mhz), default=known.clock_ghz if known else 0.0)
    if clock_ghz:
        return clock_ghz, "measured now"
    return 2.0, "assumption: this machine does not show its clock"
