"""Resident memory: the mapped file's part, and the split of a peak."""

import mmap
from pathlib import Path

import psutil

from edgekv.devices.sensors.resident import ResidentSet, mapped_resident_nbytes, split_memory


def test_a_mapped_file_counts_what_was_touched(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x" * (8 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = ResidentSet.of_self(path)
        assert sum(mapped[i] for i in range(0, 8 << 20, 4096)) > 0
        after = ResidentSet.of_self(path)
    assert after.file_nbytes == 8 << 20
    assert before.file_nbytes < 8 << 20
    assert abs(after.rss_nbytes - psutil.Process().memory_info().rss) < 16 << 20
    assert after.peak_rss_nbytes >= after.rss_nbytes
    assert ResidentSet.of_self(tmp_path / "another").file_nbytes == 0


def test_a_path_with_blanks() -> None:
    smaps = (
        "7f00-7f01 r--p 00000000 fe:00 42   /models/my model.gguf\nRss:   100 kB\nPss: 100 kB\n"
        "7f01-7f02 rw-p 00000000 00:00 0 \nRss:   50 kB\n"
        "7f02-7f03 r--p 00001000 fe:00 42   /models/my model.gguf\nRss:   28 kB\n"
    )
    assert mapped_resident_nbytes(smaps, Path("/models/my model.gguf")) == 128 * 1024


def test_the_split_adds_up_to_the_peak() -> None:
    loaded = {"rss": 200, "peak": 210, "file": 90}
    ended = {"rss": 260, "peak": 265, "file": 95}
    memory = split_memory(loaded, ended, cache=45, repacked=10)
    assert (memory.weights_nbytes, memory.cache_nbytes, memory.compute_nbytes) == (105, 45, 60)
    assert memory.other_nbytes == 265 - 105 - 45 - 60
