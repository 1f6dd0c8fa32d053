"""Bench: several models and cache types in turns, each in its own process, into one Report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from msgspec import structs

from edgekv.devices.bench.bandwidth import working_set_nbytes
from edgekv.devices.bench.settings import BenchSettings, Candidate, check, labels
from edgekv.devices.bench.worker import WorkerProcess
from edgekv.devices.boards.profile import known_memory
from edgekv.devices.predict.model_info import (
    describe_cache,
    describe_llama_cache,
    describe_model,
    describe_onnx,
)
from edgekv.devices.reporting.report import (
    FORMAT,
    VERSION,
    BenchRun,
    CacheInfo,
    ModelInfo,
    Point,
    Report,
    Settings,
    Stat,
)
from edgekv.devices.sensors.energy import EnergyMeter, find_sources
from edgekv.devices.sensors.health import read_health
from edgekv.devices.sensors.machine import probe, software
from edgekv.devices.sensors.nvml import first_card
from edgekv.devices.sensors.resident import split_memory
from edgekv.documents import encode
from edgekv.errors import BackendError, InputError
from edgekv.host.load import LoadMeter
from edgekv.host.threads import allowed_cpus, big_cores, default_threads
from edgekv.models.onnx.manifest import check_folder
from edgekv.progress import Progress, ignore

__all__ = ["BenchSettings", "Candidate", "run"]

WORKER_NBYTES = 120 * 2**20  # interpreter, libraries and buffers beside weights and cache, roughly


@dataclass
class _Lane:
    """A candidate under measurement: its process and the figures so far."""

    candidate: Candidate
    worker: WorkerProcess
    run: BenchRun
    meter: EnergyMeter
    loaded: dict[str, int] = field(default_factory=dict)
    cache_nbytes: int = 0
    repacked_nbytes: int = 0
    card_nbytes: int | None = None
    ttft: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)


def run(
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    progress: Progress = ignore,
    command: str = "edgekv bench",
) -> Report:
    """Measure every candidate and report; a candidate whose process dies has `error` set.

    Raises:
        InputError: no candidates, settings out of range, a bad model file, a cache type that does not fit.
        BackendError: no candidate could be measured at all.
    """
    return _Bench(candidates, settings, progress).report(command)


class _Bench:
    def __init__(self, candidates: Sequence[Candidate], settings: BenchSettings, progress: Progress) -> None:
        check(candidates, settings)
        cpus = settings.cpus or tuple(big_cores(set(allowed_cpus())))
        threads = settings.threads or min(len(cpus), default_threads())
        self._settings = replace(settings, cpus=cpus, threads=threads)
        self._candidates = list(candidates)
        self._progress = progress
        self._machine, self._notes = known_memory(*probe())
        self._energy, energy_notes = find_sources()
        self._notes += energy_notes
        self._runs = self._describe()
        self._turns = self._all_fit_at_once()
        lanes = len(self._candidates)
        self._steps = lanes * (2 + len(settings.depths) * (1 + settings.repeats))
        self._step = 0
        self._features: tuple[str, ...] = ()

    def report(self, command: str) -> Report:
        everyone = list(zip(self._candidates, self._runs, strict=True))
        groups = [everyone] if self._turns else [[one] for one in everyone]
        meter = LoadMeter(cpus=self._settings.cpus)
        runs = tuple(run for group in groups for run in self._measure(group))
        if (load := meter.read()) and load.busy:  # the workers are done and count as this process's children
            self._notes += (f"the machine was not the bench's own: {load.words()} while it ran",)
        if all(run.error for run in runs):
            raise BackendError(f"nothing could be measured: {runs[0].error}")
        s = self._settings
        return Report(
            format=FORMAT,
            version=VERSION,
            provenance="emulated" if self._machine.emulator else "measured",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            machine=self._machine,
            software=software(self._features),
            settings=Settings(s.n_prompt, s.n_gen, s.repeats, s.depths, s.threads, s.cpus, self._turns),
            runs=runs,
            notes=self._notes,
        )

    def _describe(self) -> list[BenchRun]:
        """Runs without results yet; every model file is read and checked before anything is measured."""
        runs = []
        s = self._settings
        for candidate, label in zip(self._candidates, labels(self._candidates), strict=True):
            model, cache = (_describe_onnx if candidate.engine == "onnx" else _describe_gguf)(candidate, s)
            if s.n_ctx > (model.context_length or s.n_ctx):
                note = f"{label}: measured up to {s.n_ctx} tokens, trained for {model.context_length}"
                self._notes += (note,)
            runs.append(BenchRun(label, candidate.engine, model, cache))
        return runs

    def _all_fit_at_once(self) -> bool:
        available = self._machine.available_nbytes
        if available is None or len(self._runs) == 1:
            return True
        wanted = sum(
            (run.model.weights_nbytes or 0)
            + (run.cache.read_nbytes(self._settings.n_ctx) or 0)
            + WORKER_NBYTES
            for run in self._runs
        )
        if wanted < 0.8 * available:
            return True
        self._notes += ("the candidates do not fit the memory together: measured one after the other",)
        return False

    def _measure(self, group: list[tuple[Candidate, BenchRun]]) -> Iterator[BenchRun]:
        with ExitStack() as stack:
            lanes = []
            for candidate, run in group:
                self._announce(f"{run.label}: memory bandwidth")
                run = structs.replace(self._with_bandwidth(run), before=read_health())
                worker = stack.enter_context(WorkerProcess(run.label))
                lanes.append(_Lane(candidate, worker, run, EnergyMeter(self._energy)))
            for lane in lanes:
                self._announce(f"{lane.run.label}: load")
                self._guard(lane, self._open)
            for depth in self._settings.depths:
                self._measure_depth(lanes, depth)
            for lane in lanes:
                self._guard(lane, self._read_memory)
                yield structs.replace(lane.run, after=read_health())

    def _with_bandwidth(self, run: BenchRun) -> BenchRun:
        """Measured in a process of its own, so that the array does not count as the model's memory."""
        s = self._settings
        nbytes = working_set_nbytes(run.model.read_nbytes or 0, self._machine.available_nbytes)
        with WorkerProcess(run.label) as worker:
            gb_s = worker.ask("bandwidth", nbytes=nbytes, threads=s.threads, cpus=s.cpus)
        return structs.replace(run, bandwidth_gb_s=gb_s, bandwidth_nbytes=nbytes)

    def _open(self, lane: _Lane) -> None:
        s = self._settings
        on_card = lane.candidate.engine == "llama.cpp"
        card_before = lane.worker.ask("card") if on_card else None
        opened = lane.worker.ask(
            "open",
            path=str(lane.candidate.path),
            engine=lane.candidate.engine,
            n_ctx=s.n_ctx,
            cache_type=lane.candidate.cache_type,
            threads=s.threads,
            cpus=s.cpus,
            eviction=encode(s.eviction),
        )
        lane.loaded = lane.worker.ask("memory")
        if lane.candidate.engine != "llama.cpp":  # NumPy's zeros become resident when they are written
            lane.loaded["rss"] += opened["cache_nbytes"]
        first_ttft_s = lane.worker.ask("prefill", n=s.n_prompt)
        lane.worker.ask("decode", n=min(8, s.n_gen))  # warms the decode path; not counted
        if on_card:
            self._features = tuple(lane.worker.ask("engine_features"))
        if card_before is not None and (card := first_card()):
            self._machine = structs.replace(self._machine, card=card.name, card_nbytes=card.total_nbytes)
            lane.card_nbytes = lane.worker.ask("card") - card_before
        lane.cache_nbytes, lane.repacked_nbytes = opened["cache_nbytes"], opened["repacked_nbytes"]
        lane.run = structs.replace(lane.run, load_s=opened["load_s"], first_ttft_s=first_ttft_s)
        if s.eviction:
            self._notes += (
                f"{lane.run.label}: {s.budget} tokens stay in the cache by the policy {s.policy}",
            )
        if opened["kernel"] == "edgekv":
            self._notes += (f"{lane.run.label}: attention by EdgeKV's kernel",)
        if lane.card_nbytes:  # decoding reads the card's memory: the cores' bandwidth is no ceiling
            lane.run = structs.replace(lane.run, bandwidth_gb_s=None, bandwidth_nbytes=None)

    def _measure_depth(self, lanes: list[_Lane], depth: int) -> None:
        for lane in lanes:
            lane.ttft, lane.decode, lane.joules = [], [], []
            self._announce(f"{lane.run.label}: fill the cache to depth {depth}")
            self._guard(lane, lambda lane: lane.worker.ask("fill", depth=depth))
        for repeat in range(self._settings.repeats):
            for lane in lanes:
                self._announce(f"{lane.run.label}: depth {depth}, sample {repeat + 1}")
                self._guard(lane, self._sample)
        for lane in lanes:
            if lane.run.error is None:
                lane.run = structs.replace(lane.run, points=(*lane.run.points, self._point(lane, depth)))

    def _sample(self, lane: _Lane) -> None:
        lane.ttft.append(lane.worker.ask("prefill", n=self._settings.n_prompt))
        lane.meter.start()
        try:
            lane.decode.append(lane.worker.ask("decode", n=self._settings.n_gen))
        finally:
            lane.joules.append(lane.meter.stop())

    def _point(self, lane: _Lane, depth: int) -> Point:
        s = self._settings
        known = [joules for joules in lane.joules if joules is not None]
        decode_tps = Stat.of([s.n_gen / seconds for seconds in lane.decode])
        # The depth grows while the n_gen tokens are decoded: their mean is half way.
        read, cached = lane.run.model.read_nbytes, lane.run.cache.read_nbytes(s.n_cached(depth + s.n_gen / 2))
        nbytes = None if read is None or cached is None else read + round(cached)
        ceiling = lane.run.bandwidth_gb_s
        return Point(
            depth=depth,
            ttft_s=Stat.of(lane.ttft),
            prefill_tps=Stat.of([s.n_prompt / seconds for seconds in lane.ttft]),
            decode_tps=decode_tps,
            decode_j_per_token=sum(known) / (len(known) * s.n_gen) if known else None,
            decode_nbytes=nbytes,
            roofline_share=nbytes * decode_tps.median / 1e9 / ceiling if nbytes and ceiling else None,
        )

    def _read_memory(self, lane: _Lane) -> None:
        seen = lane.worker.ask("memory")
        memory = split_memory(lane.loaded, seen, lane.cache_nbytes, lane.repacked_nbytes, lane.card_nbytes)
        lane.run = structs.replace(lane.run, memory=memory, energy_source=lane.meter.name)

    def _guard(self, lane: _Lane, action: Callable[[_Lane], object]) -> None:
        """Run `action`; an engine that dies or refuses ends its own lane and no other."""
        if lane.run.error is not None:
            return
        try:
            action(lane)
        except BackendError as error:
            lane.run = structs.replace(lane.run, error=str(error))

    def _announce(self, text: str) -> None:
        self._step += 1
        self._progress(self._step, self._steps, text)


def _describe_gguf(candidate: Candidate, s: BenchSettings) -> tuple[ModelInfo, CacheInfo]:
    from edgekv.models.gguf.source import GGUFSource

    source = GGUFSource(candidate.path)
    describe = describe_llama_cache if candidate.engine == "llama.cpp" else describe_cache
    try:
        cache = describe(source.spec, candidate.cache_type, s.n_ctx)
    except ValueError as error:
        raise InputError(f"{candidate.path}: cache type {candidate.cache_type}: {error}") from error
    return describe_model(source, candidate.path, s.with_hash), cache


def _describe_onnx(candidate: Candidate, s: BenchSettings) -> tuple[ModelInfo, CacheInfo]:
    manifest = check_folder(candidate.path)
    if candidate.cache_type != manifest.model.cache_type:
        raise InputError(
            f"{candidate.path} was exported with a cache in {manifest.model.cache_type}, not "
            f"{candidate.cache_type}; leave out the cache type, or export it again"
        )
    return describe_onnx(manifest, candidate.path, s.n_ctx)
