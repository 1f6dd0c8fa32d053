"""Memory that is left, read from made-up system files, and the refusal before a model is loaded."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.llama_cpp.fits import require_memory
from edgekv.errors import InputError
from edgekv.host.memory import available_nbytes, memory_limit_nbytes, release_code, release_file
from edgekv.models.gguf.header import read_header

MIB = 2**20


def system(root: Path, free_mib: int, swap_mib: int = 0) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 8388608 kB\nMemAvailable: {free_mib * 1024} kB\nSwapFree: {swap_mib * 1024} kB\n"
    )
    return root


def cgroup_v2(root: Path, name: str, limit: str, used_mib: int, cached_mib: int) -> None:
    folder = root / "sys/fs/cgroup" / name
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used_mib * MIB))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached_mib * MIB}\nactive_file {2 * MIB}\n")
    (root / "proc/self/cgroup").write_text(f"0::/{name}\n")


def test_a_machine_without_containers(tmp_path: Path) -> None:
    assert available_nbytes(system(tmp_path, 300, swap_mib=50)) == 350 * MIB
    assert memory_limit_nbytes(tmp_path) is None
    assert available_nbytes(tmp_path / "nothing") is None


def test_every_ancestor_of_a_cgroup_counts(tmp_path: Path) -> None:
    system(tmp_path, 4000)
    cgroup_v2(tmp_path, "board", str(512 * MIB), used_mib=100, cached_mib=30)
    cgroup_v2(tmp_path, "board/chat", "max", used_mib=50, cached_mib=0)
    assert memory_limit_nbytes(tmp_path) == 512 * MIB
    assert available_nbytes(tmp_path) == (512 - 100 + 30 + 2) * MIB


def test_a_limit_at_which_the_kernel_slows_a_process_down_counts(tmp_path: Path) -> None:
    cgroup_v2(system(tmp_path, 4000), "chat", str(900 * MIB), used_mib=0, cached_mib=0)
    (tmp_path / "sys/fs/cgroup/chat/memory.high").write_text(str(400 * MIB))
    assert memory_limit_nbytes(tmp_path) == 400 * MIB


def test_cgroup_v1_writes_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    system(tmp_path, 4000)
    (tmp_path / "proc/self/cgroup").write_text("9:cpu:/x\n8:memory:/a/b\n0::/\n")
    for name, limit in (("", 2**63 - 4096), ("a", 1000 * MIB), ("a/b", 2**63 - 4096)):
        folder = tmp_path / "sys/fs/cgroup/memory" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "memory.usage_in_bytes").write_text(str(400 * MIB))
        (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {MIB}\n")
    assert memory_limit_nbytes(tmp_path) == 1000 * MIB
    assert available_nbytes(tmp_path) == 601 * MIB


def test_a_memory_limit_is_found_where_its_controller_is_mounted(tmp_path: Path) -> None:
    folder = tmp_path / "dev/memcg/apps"  # Android
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(300 * MIB))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("2:memory:/apps\n")
    (tmp_path / "proc/self/mountinfo").write_text("9 1 0:9 / /dev/memcg rw - cgroup none rw,memory\n")
    assert memory_limit_nbytes(tmp_path) == 300 * MIB


def test_bytes_left_beside_a_model_are_returned(tiny_llama: Path, tmp_path: Path) -> None:
    header = read_header(tiny_llama)
    left = [
        require_memory(tiny_llama, header, 256, "f16", 128, system(tmp_path / str(n), n)) for n in (300, 400)
    ]
    assert left[0] is not None
    assert left[1] == left[0] + 100 * MIB
    assert 0 < left[0] < 300 * MIB
    assert require_memory(tiny_llama, header, 256, "f16", 128, tmp_path) is None


class TestRefusal:
    def ask(self, model: Path, root: Path, n_ctx: int = 8192, cache_type: str = "f16") -> None:
        require_memory(model, read_header(model), n_ctx, cache_type, 128, root)

    def test_the_remedies_it_names_are_accepted(self, smollm2: Path, tmp_path: Path) -> None:
        """92 MiB of weights and 180 of cache in what a Raspberry Pi Zero 2 W has left."""
        root = system(tmp_path, 291)
        with pytest.raises(InputError, match=r"92 of weights, 180 of cache.* and 291 MiB are left") as error:
            self.ask(smollm2, root)
        words = str(error.value).split()
        context = int(words[words.index("--ctx-size") + 1])
        self.ask(smollm2, root, n_ctx=context)
        with pytest.raises(InputError):
            self.ask(smollm2, root, n_ctx=context + 256)
        self.ask(smollm2, root, cache_type=words[words.index("--cache-type") + 1])

    def test_swap_counts(self, smollm2: Path, tmp_path: Path) -> None:
        self.ask(smollm2, system(tmp_path, 291, swap_mib=100))

    def test_a_model_that_never_fits(self, smollm2: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="take a smaller model"):
            self.ask(smollm2, system(tmp_path, 60))

    def test_what_cannot_be_known_is_let_through(self, smollm2: Path, tmp_path: Path) -> None:
        self.ask(smollm2, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_code_leaves_memory_and_comes_back_when_used() -> None:
    matrix = np.eye(3)
    np.linalg.det(matrix)
    library = sys.modules["numpy.linalg._umath_linalg"].__file__  # nothing runs it meanwhile
    assert library
    assert _resident_nbytes(library, "r-xp") > 0
    release_code()
    assert _resident_nbytes(library, "r-xp") == 0
    assert np.linalg.det(matrix) == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_file_leaves_memory_and_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(b"x" * 2**16)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == b"x" * 2**16
        assert _resident_nbytes(str(path), "r") == 2**16
        release_file(path)
        assert _resident_nbytes(str(path), "r") == 0
        assert mapped[:] == b"x" * 2**16


def _resident_nbytes(path: str, permissions: str) -> int:
    """Of a file's mappings whose permissions begin so."""
    nbytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            inside = fields[5:] == [path] and fields[1].startswith(permissions)
        elif inside and fields[0] == "Rss:":
            nbytes += int(fields[1]) * 1024
    return nbytes


def test_counts_that_are_none_are_left_out(tmp_path: Path) -> None:
    root = system(tmp_path, 300)
    with (root / "proc/meminfo").open("a") as meminfo:
        meminfo.write("SwapTotal: some kB\nHugePages_Total: 3\nNode 0: kB\nA: -5 kB\n")
    cgroup_v2(root, "a", f"{200 * MIB}", 50, 30)
    (root / "sys/fs/cgroup/a/memory.stat").write_text("anon\nactive_file x\ninactive_file 1048576\n")
    assert available_nbytes(root) == 151 * MIB
    (root / "sys/fs/cgroup/a/memory.current").write_text("?")
    (root / "sys/fs/cgroup/a/memory.max").write_text("\u00b2")
    assert available_nbytes(root) == 300 * MIB
