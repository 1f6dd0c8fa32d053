"""Thread defaults on recorded sysfs layouts of real machines."""

from pathlib import Path

import pytest

from edgekv.host.threads import big_cores, cpu_quota, default_threads


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def cpu(number: int, **files: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{number}"
    return {f"{folder}/{name.replace('__', '/')}": text for name, text in files.items()}


def merge(*parts: dict[str, str]) -> dict[str, str]:
    return {name: text for part in parts for name, text in part.items()}


def test_rk3588_uses_its_four_a76(tmp_path: Path) -> None:
    little = [cpu(i, cpu_capacity="530") for i in range(4)]
    big = [cpu(i, cpu_capacity="1024") for i in range(4, 8)]
    root = write(tmp_path, merge(*little, *big))
    assert big_cores(set(range(8)), root) == [4, 5, 6, 7]
    assert big_cores({0, 1, 5}, root) == [5]
    assert big_cores({0, 1}, root) == [0, 1]


def test_smt_siblings_count_once_and_e_cores_do_not(tmp_path: Path) -> None:
    """A hybrid Intel laptop: two P cores with two threads each, two E cores of nearly the same clock."""
    files = {"sys/devices/cpu_atom/cpus": "4-5"}
    for i, siblings in enumerate(["0-1", "0-1", "2-3", "2-3", "4", "5"]):
        mhz = "5000000" if i < 4 else "4100000"
        files |= cpu(i, cpufreq__cpuinfo_max_freq=mhz, topology__thread_siblings_list=siblings)
    root = write(tmp_path, files)
    assert big_cores(set(range(6)), root) == [0, 2]
    assert big_cores({4, 5}, root) == [4, 5]


def test_a_machine_that_tells_nothing_counts_every_core(tmp_path: Path) -> None:
    assert big_cores({0, 1, 2}, tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n0::/",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "4:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, None),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


def test_a_quota_below_one_cpu_still_gives_a_thread(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert default_threads(root) == 1


@pytest.mark.parametrize(
    "mounted",
    [
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000"},
        {"sys/fs/cgroup/cpuacct,cpu/cpu.cfs_quota_us": "200000"},
        {
            "proc/self/mountinfo": "31 23 0:28 / /odd rw,relatime shared:9 - tmpfs tmpfs rw\n\n"
            r"33 31 0:30 / /my\040groups/processors rw,relatime - cgroup cgroup rw,cpu,cpuacct",
            "my groups/processors/cpu.cfs_quota_us": "200000",
        },
        {
            "proc/self/cgroup": "2:cpuacct:/\n0::/",
            "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "sys/fs/cgroup/unified/cpu.max": "200000 100000",
        },
    ],
)
def test_a_quota_is_found_where_its_controller_is_mounted(tmp_path: Path, mounted: dict[str, str]) -> None:
    assert cpu_quota(write(tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/"} | mounted)) == 2.0


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0\n\n:\n0::/"},
        {"sys/fs/cgroup/cpu.max": "200000 0"},
        {"sys/fs/cgroup/cpu.max": "nan 1"},
        {"sys/fs/cgroup/cpu.max": "-5 100000"},
        {"proc/self/cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "\u00b2"},
        {"proc/self/cgroup": "0::/a\0b"},
        {"proc/self/mountinfo": "30 23 0:26 / /a\\000b rw - cgroup2 cgroup2 rw"},
        {"sys/devices/cpu_atom/cpus": "0-"},
        cpu(0, topology__thread_siblings_list="zero"),
        cpu(0, cpu_capacity="N/A", cpufreq__cpuinfo_max_freq="<unknown>"),
    ],
)
def test_files_that_are_not_as_documented_count_as_missing(tmp_path: Path, files: dict[str, str]) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/"} | files)
    assert cpu_quota(root) is None
    assert default_threads(root) == default_threads(tmp_path / "nothing")
