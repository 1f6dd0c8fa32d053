"""Temperatures and throttling, from what the kernel and a Raspberry Pi's firmware show."""

from __future__ import annotations

from pathlib import Path

from edgekv.devices.reporting.report import Health
from edgekv.devices.sensors.vcgencmd import vcgencmd
from edgekv.host.proc import read_number, read_text

# Bits of `vcgencmd get_throttled` (raspberrypi.com documentation, os.html#get_throttled).
PI_THROTTLE_BITS = {
    0: "under-voltage now",
    1: "CPU frequency capped now",
    2: "throttled now",
    3: "soft temperature limit active now",
    16: "under-voltage has occurred since boot",
    17: "CPU frequency cap has occurred since boot",
    18: "throttling has occurred since boot",
    19: "soft temperature limit has occurred since boot",
}


def read_health(root: Path = Path("/")) -> Health:
    """Heat and throttling now; `throttling` is None where it cannot be read."""
    return Health(temperatures_c(root), throttling(root))


def temperatures_c(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius by thermal zone; zones that cannot be read are left out."""
    found: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        millidegrees = read_number(zone / "temp")
        if millidegrees is not None and -50_000 < millidegrees < 200_000:
            name = read_text(zone / "type") or zone.name
            found[name if name not in found else f"{name} {zone.name[12:]}"] = millidegrees / 1000
    for sensor in sorted(root.glob("sys/class/hwmon/hwmon*/temp1_input")):
        chip = read_text(sensor.parent / "name") or sensor.parent.name
        millidegrees = read_number(sensor)
        if chip in ("k10temp", "coretemp", "zenpower") and millidegrees is not None:
            found.setdefault(chip, millidegrees / 1000)
    return found


def pi_throttle_words(bits: int) -> tuple[str, ...]:
    """The set bits of get_throttled in words."""
    return tuple(words for bit, words in PI_THROTTLE_BITS.items() if bits >> bit & 1)


def throttling(root: Path = Path("/")) -> tuple[str, ...] | None:
    """Throttling in words, empty if there is none; None if it cannot be read."""
    bits = _pi_throttle_bits(root)
    if bits is not None:
        return pi_throttle_words(bits)
    counters = sorted(root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"))
    counts = [count for path in counters if (count := read_number(path)) is not None]
    if not counts:
        return None
    events = int(sum(counts))
    return (f"{events} thermal throttle events since boot",) if events else ()


def _pi_throttle_bits(root: Path) -> int | None:
    text = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None and root == Path("/"):
        text = vcgencmd("get_throttled")
    try:  # vcgencmd prints "throttled=0x50005", sysfs "50005"
        return int((text or "").strip().removeprefix("throttled="), 16)
    except ValueError:
        return None
