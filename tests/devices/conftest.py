"""Fixtures for machines: small copies of what /proc and /sys show, as real boards print it."""

from collections.abc import Callable
from pathlib import Path

import pytest

MakeRoot = Callable[[dict[str, str]], Path]


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """Builds a root folder from {path: text}."""

    def make(files: dict[str, str]) -> Path:
        root = tmp_path / "root"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    return make


def _arm_cpuinfo(parts: list[str], features: str) -> str:
    """The /proc/cpuinfo of an Arm board with one core of each part."""
    return "\n\n".join(
        f"processor\t: {i}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}"
        for i, part in enumerate(parts)
    )


@pytest.fixture
def rk3588(make_root: MakeRoot) -> Path:
    """An Orange Pi 5: four big cores and four little ones."""
    return make_root(
        {
            "proc/cpuinfo": _arm_cpuinfo(
                ["0xd05"] * 4 + ["0xd0b"] * 4, "fp asimd asimdhp asimddp fphp crc32"
            ),
            "proc/meminfo": "MemTotal:        7928416 kB\nMemAvailable:    7213004 kB\nSwapTotal:             0 kB\n",
            "proc/device-tree/model": "Orange Pi 5\0",
            "proc/device-tree/compatible": "rockchip,rk3588s-orangepi-5\0rockchip,rk3588\0",
            "sys/devices/system/cpu/online": "0-7\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            **{f"sys/devices/system/cpu/cpu{i}/cpu_capacity": "530" if i < 4 else "1024" for i in range(8)},
            **{
                f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "1800000" if i < 4 else "2352000"
                for i in range(8)
            },
        }
    )
