"""CPU features: what this CPU has and what the llama.cpp build needs, checked before any of its code runs.

A build names its features (llama_print_system_info, called in a child process). On Arm the instructions in
libggml-cpu count too: a build for a newer core dies at its first such instruction, whatever it names.
"""

from __future__ import annotations

import importlib.util
import platform
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import BackendError
from edgekv.host.proc import cpuinfo_blocks

# Names in llama_print_system_info -> flags of /proc/cpuinfo, one of which must be there.
FEATURE_FLAGS = {
    **{"SSE3": ("pni",), "SSSE3": ("ssse3",), "AVX": ("avx",), "AVX2": ("avx2",), "F16C": ("f16c",)},
    **{"FMA": ("fma",), "BMI2": ("bmi2",), "AVX_VNNI": ("avx_vnni",), "AVX512": ("avx512f",)},
    **{"AVX512_VBMI": ("avx512vbmi",), "AVX512_VNNI": ("avx512_vnni",), "AVX512_BF16": ("avx512_bf16",)},
    **{"AMX_INT8": ("amx_int8",), "NEON": ("asimd", "neon"), "ARM_FMA": ("asimd", "vfpv4"), "SVE": ("sve",)},
    **{"FP16_VA": ("asimdhp",), "DOTPROD": ("asimddp",), "MATMUL_INT8": ("i8mm",), "SME": ("sme",)},
}

# A64 instructions (Arm ARM DDI 0487, C7.2): mask, value, the flag of the CPUs that have them.
A64_INSTRUCTIONS = (
    (0xBFE0FC00, 0x0E809400, "asimddp"),  # SDOT (vector)
    (0xBFE0FC00, 0x2E809400, "asimddp"),  # UDOT (vector)
    (0xFFE0FC00, 0x4E80A400, "i8mm"),  # SMMLA
    (0xBFE0FC00, 0x0E400C00, "asimdhp"),  # FMLA (vector, half precision)
)
# Constants between functions can look like an instruction (libgfortran has 16 that look like FMLA); a kernel
# that uses one holds hundreds.
MIN_COUNT = 64
ELF_AARCH64 = 183

# Bits of AT_HWCAP (16) and AT_HWCAP2 (26): Linux, arch/arm64/include/uapi/asm/hwcap.h.
ARM_HWCAPS = {
    16: {1: "asimd", 7: "crc32", 9: "fphp", 10: "asimdhp", 20: "asimddp", 22: "sve"},
    26: {1: "sve2", 13: "i8mm", 14: "bf16", 23: "sme"},
}
REBUILD = (
    "build it on this machine: pip install --force-reinstall --no-binary llama-cpp-python 'edgekv[llama]' "
    "(for another machine: CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8-a')"
)


def require_runnable(root: Path = Path("/")) -> None:
    """Check that this CPU has the instructions that llama.cpp was built with (Arm only).

    Raises:
        BackendError: it lacks some, and the first dot product would kill the process.
    """
    library = engine_library()
    if platform.machine() != "aarch64" or library is None:
        return
    flags = cpu_flags(root)
    if flags and (lacking := sorted(arm_flags_used(library.read_bytes()) - flags)):
        raise BackendError(
            f"llama.cpp was built for a CPU with {', '.join(lacking)}, which this one lacks, and would die of an "
            f"illegal instruction; {REBUILD}"
        )


def cpu_flags(root: Path = Path("/"), machine: str = "") -> set[str]:
    """Flags of the CPU, named as in /proc/cpuinfo; empty where there is no such list.

    On Arm they are read from the auxiliary vector, getauxval(3): in an emulator it holds the emulated CPU's
    flags, whereas /proc/cpuinfo is the host's.
    """
    if (machine or platform.machine()) == "aarch64" and (flags := _hwcaps(root / "proc/self/auxv")):
        return flags
    blocks = cpuinfo_blocks(root).values()
    return {flag for block in blocks for key in ("flags", "features") for flag in block.get(key, "").split()}


def _hwcaps(auxv: Path) -> set[str]:
    try:
        entries = list(struct.iter_unpack("<QQ", auxv.read_bytes()))
    except (OSError, struct.error):
        return set()
    return {
        flag for kind, bits in entries for bit, flag in ARM_HWCAPS.get(kind, {}).items() if bits >> bit & 1
    }


def missing_features(features: Collection[str], cpu_flags: Collection[str]) -> list[str]:
    """Features that a build uses and a CPU lacks; names without a known flag are left out."""
    return [
        name
        for name in features
        if name in FEATURE_FLAGS and not any(flag in cpu_flags for flag in FEATURE_FLAGS[name])
    ]


def engine_library() -> Path | None:
    """libggml-cpu of the installed llama-cpp-python, found without loading it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted((Path(spec.origin).parent / "lib").glob("libggml-cpu.so*"))), None)


def arm_flags_used(library: bytes) -> set[str]:
    """CPU flags that the instructions of an AArch64 ELF library need; empty for other machines."""
    if library[:4] != b"\x7fELF" or int.from_bytes(library[18:20], "little") != ELF_AARCH64:
        return set()
    code = _code(library)
    return {
        flag for mask, value, flag in A64_INSTRUCTIONS if np.count_nonzero(code & mask == value) >= MIN_COUNT
    }


def _code(library: bytes) -> NDArray[np.uint32]:
    """The 32-bit words of the executable segments (ELF-64 specification, program headers)."""
    (offset,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    code = b""
    for i in range(count):
        kind, flags, start, _, _, length = struct.unpack_from("<IIQQQQ", library, offset + i * size)
        if kind == 1 and flags & 1:  # PT_LOAD, executable
            code += library[start : start + length // 4 * 4]
    return np.frombuffer(code, "<u4")
