"""Temperatures, throttling and energy, from files as real machines have them."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.devices.sensors.energy import EnergyMeter, EnergySource, find_sources, pmic_watts
from edgekv.devices.sensors.health import pi_throttle_words, read_health

MakeRoot = Callable[[dict[str, str]], Path]


def test_temperatures_by_zone(make_root: MakeRoot) -> None:
    root = make_root(
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "51234\n",
            "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "49000\n",
            "sys/class/thermal/thermal_zone2/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone2/temp": "no reading\n",
        }
    )
    assert read_health(root).temperature_c == {"cpu-thermal": 51.234, "cpu-thermal 1": 49.0}


def test_pi_throttling_in_words(make_root: MakeRoot) -> None:
    root = make_root({"sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n"})
    assert read_health(root).throttling == (
        "under-voltage now",
        "throttled now",
        "under-voltage has occurred since boot",
        "throttling has occurred since boot",
    )
    assert pi_throttle_words(0) == ()


def test_x86_throttle_counters(make_root: MakeRoot) -> None:
    folder = "sys/devices/system/cpu/cpu{}/thermal_throttle/core_throttle_count"
    root = make_root({folder.format(0): "3\n", folder.format(1): "0\n"})
    assert read_health(root).throttling == ("3 thermal throttle events since boot",)


def test_a_machine_that_tells_nothing_is_not_called_healthy(tmp_path: Path) -> None:
    health = read_health(tmp_path)
    assert health.throttling is None
    assert health.temperature_c == {}


def test_rapl_counts_and_wraps(make_root: MakeRoot) -> None:
    folder = "sys/class/powercap/intel-rapl:0"
    root = make_root(
        {
            f"{folder}/name": "package-0\n",
            f"{folder}/energy_uj": "262143000000\n",
            f"{folder}/max_energy_range_uj": "262144000000\n",
        }
    )
    sources, notes = find_sources(root)
    assert [source.name for source in sources] == ["RAPL package-0"]
    assert notes == ()
    meter = EnergyMeter(sources)
    meter.start()
    (root / folder / "energy_uj").write_text("2000000\n")
    assert meter.stop() == pytest.approx(3.0)


def test_unreadable_rapl_is_a_note_and_not_a_zero(make_root: MakeRoot) -> None:
    folder = "sys/class/powercap/intel-rapl:0"
    root = make_root({f"{folder}/name": "package-0\n"})
    (root / folder / "energy_uj").mkdir()  # opening it fails, as without permission
    sources, notes = find_sources(root)
    assert sources == ()
    assert "run as root" in notes[0]
    meter = EnergyMeter(sources)
    meter.start()
    assert meter.stop() is None


def test_jetson_input_rail(make_root: MakeRoot) -> None:
    folder = "sys/class/hwmon/hwmon3"
    root = make_root(
        {
            f"{folder}/name": "ina3221\n",
            f"{folder}/in1_label": "VDD_IN\n",
            f"{folder}/in1_input": "5000\n",
            f"{folder}/curr1_input": "1400\n",
            f"{folder}/in2_label": "VDD_CPU_GPU_CV\n",
            f"{folder}/in2_input": "5000\n",
            f"{folder}/curr2_input": "400\n",
        }
    )
    (source,), _ = find_sources(root)
    assert not source.is_counter
    assert source.read() == pytest.approx(7.0)


def test_power_is_integrated_over_time() -> None:
    meter = EnergyMeter((EnergySource("10 W", lambda: 10.0, is_counter=False),))
    start = time.perf_counter()
    meter.start()
    time.sleep(0.2)
    joules = meter.stop()
    assert joules == pytest.approx(10 * (time.perf_counter() - start), rel=0.1)


def test_a_sensor_that_fails_midway_gives_no_figure() -> None:
    readings = itertools.chain([5.0], itertools.repeat(None))
    meter = EnergyMeter((EnergySource("dying", lambda: next(readings), is_counter=False),))
    meter.start()
    assert meter.stop() is None


def test_pmic_rails_of_a_pi_5() -> None:
    text = (
        "   3V7_WL_SW_A current(0)=0.10000000A\n   VDD_CORE_A current(7)=2.00000000A\n"
        "   3V7_WL_SW_V volt(8)=3.70000000V\n   VDD_CORE_V volt(15)=0.80000000V\n   EXT5V_V volt(24)=5.10000000V\n"
    )
    assert pmic_watts(text) == pytest.approx(0.37 + 1.6)
    assert pmic_watts("vc_gencmd_read_response returned -1") is None
