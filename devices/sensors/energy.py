"""Energy of a stretch of work: RAPL and NVML counters, or INA and PMIC power readings summed over time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekv.devices.sensors.nvml import missing_package, power_readers
from edgekv.devices.sensors.vcgencmd import vcgencmd
from edgekv.host.proc import read_number, read_text

SAMPLE_PERIOD_S = 0.05


@dataclass(frozen=True)
class EnergySource:
    """A sensor: a counter in joules, or a power reading in watts."""

    name: str
    read: Callable[[], float | None]
    is_counter: bool
    wraps_at: float | None = None  # joules at which a counter starts again


def find_sources(root: Path = Path("/")) -> tuple[tuple[EnergySource, ...], tuple[str, ...]]:
    """This machine's energy sensors, and notes on those that cannot be read."""
    found: list[EnergySource] = []
    notes: list[str] = []
    for domain in sorted(root.glob("sys/class/powercap/intel-rapl:?")):
        _add_rapl(domain, found, notes)
    found += _ina_sources(root)
    if root == Path("/"):
        if _read_pmic() is not None:
            found.append(EnergySource("Pi 5 PMIC rails (without USB)", _read_pmic, False))
        found += _nvml_sources()
    notes += missing_package(root)
    if not found and not notes:
        notes.append("energy unknown: no RAPL, INA, PMIC or NVML sensor on this machine")
    return tuple(found), tuple(notes)


class EnergyMeter:
    """Sums the energy of every source between `start` and `stop`.

    Counters are read twice; powers are sampled by a thread and integrated by the trapezoid rule.
    """

    def __init__(self, sources: tuple[EnergySource, ...]) -> None:
        self.sources = sources
        self._first: list[float | None] = []
        self._joules: list[float] = []
        self._failed = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str | None:
        """Names of the sources, or None without any."""
        return " + ".join(source.name for source in self.sources) or None

    def start(self) -> None:
        """Begin a stretch."""
        self._failed = False
        self._first = [source.read() for source in self.sources]
        self._joules = [0.0] * len(self.sources)
        self._stop.clear()
        if any(not source.is_counter for source in self.sources):
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> float | None:
        """Joules since `start`; None if there is no source or one of them failed."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        if not self.sources:
            return None
        for i, source in enumerate(self.sources):
            if source.is_counter:
                self._joules[i] = self._counted(source, self._first[i])
        return None if self._failed else sum(self._joules)

    def _counted(self, source: EnergySource, first: float | None) -> float:
        last = source.read()
        if first is None or last is None:
            self._failed = True
            return 0.0
        wrapped = source.wraps_at if last < first and source.wraps_at else 0.0
        return last - first + wrapped

    def _sample(self) -> None:
        powers = [(i, source) for i, source in enumerate(self.sources) if not source.is_counter]
        last_watts = [source.read() for _, source in powers]
        last_time = time.perf_counter()
        running = True
        while running:
            running = not self._stop.wait(SAMPLE_PERIOD_S)
            watts = [source.read() for _, source in powers]
            now = time.perf_counter()
            for (i, _), before, after in zip(powers, last_watts, watts, strict=True):
                if before is None or after is None:
                    self._failed = True
                else:
                    self._joules[i] += (before + after) / 2 * (now - last_time)
            last_watts, last_time = watts, now


def _add_rapl(domain: Path, found: list[EnergySource], notes: list[str]) -> None:
    """Intel's and AMD's package counter (Documentation/power/powercap/powercap.rst)."""
    name = f"RAPL {read_text(domain / 'name') or domain.name}"
    if not (read_text(domain / "name") or "package").startswith("package"):
        return  # psys and dram overlap the package or are absent on most machines
    if read_number(domain / "energy_uj") is None:
        notes.append(f"energy of {name} unknown: {domain / 'energy_uj'} cannot be read; run as root")
        return
    wraps = read_number(domain / "max_energy_range_uj")
    path = domain / "energy_uj"
    found.append(EnergySource(name, lambda: _scaled(path, 1e-6), True, wraps / 1e6 if wraps else None))


def _scaled(path: Path, factor: float) -> float | None:
    value = read_number(path)
    return None if value is None else value * factor


def _ina_sources(root: Path) -> list[EnergySource]:
    """The board's input rail on an INA3221 or INA2xx (Documentation/hwmon/ina3221.rst, ina2xx.rst).

    Only one rail counts, since the others lie behind it: VDD_IN on a Jetson, else the first one.
    """
    chips = sorted(root.glob("sys/class/hwmon/hwmon*"))
    found = (_ina_source(chip) for chip in chips if (read_text(chip / "name") or "").startswith("ina"))
    return next(([source] for source in found if source), [])


def _ina_source(chip: Path) -> EnergySource | None:
    power = chip / "power1_input"  # microwatts
    if read_number(power) is not None:
        return EnergySource(str(read_text(chip / "name")), lambda: _scaled(power, 1e-6), False)
    rails = {read_text(label): label.name[2:-6] for label in sorted(chip.glob("in*_label"))}
    index = rails.get("VDD_IN") or next(iter(rails.values()), "1")
    volts, amps = chip / f"in{index}_input", chip / f"curr{index}_input"
    if read_number(volts) is None or read_number(amps) is None:
        return None
    return EnergySource("INA3221 input rail", lambda: _product(volts, amps), False)


def _product(millivolts: Path, milliamps: Path) -> float | None:
    volts, amps = read_number(millivolts), read_number(milliamps)
    return None if volts is None or amps is None else volts * amps * 1e-6


def pmic_watts(text: str) -> float | None:
    """Sum of volts x amps over the rails of `vcgencmd pmic_read_adc` (Raspberry Pi 5)."""
    amps = dict(re.findall(r"(\S+)_A current\(\d+\)=([\d.]+)A", text))
    volts = dict(re.findall(r"(\S+)_V volt\(\d+\)=([\d.]+)V", text))
    rails = amps.keys() & volts.keys()
    return sum(float(amps[r]) * float(volts[r]) for r in rails) if rails else None


def _read_pmic() -> float | None:
    return pmic_watts(vcgencmd("pmic_read_adc") or "")


def _nvml_sources() -> Iterator[EnergySource]:
    """Every NVIDIA card's energy counter, or its power where it has none."""
    for i, (counter, power) in enumerate(power_readers()):
        if counter() is not None:
            yield EnergySource(f"NVML GPU {i}", counter, True)
        elif power() is not None:
            yield EnergySource(f"NVML GPU {i}", power, False)
