"""Number formats of weights and caches: bytes per block, ids, and which programs read and write them.

Standard library only. Sources, in llama.cpp: ggml/include/ggml.h (enum ggml_type), ggml/src/ggml-common.h (blocks),
ggml/src/ggml-cpu/repack.cpp (ggml_repack_get_optimal_repack_type), include/llama.h (enum llama_ftype).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

KEEP: Final = "keep"  # beside the names of formats: weights stay as they are stored
SUPERBLOCK = 256  # values: the block of K- and most I-formats


@dataclass(frozen=True)
class Format:
    """A number format of ggml.

    Attributes:
        name: as options spell it; ggml's own name is in capitals.
        ggml_id: enum ggml_type.
        block: values per block, which share their scales; 1 where each value stands alone.
        block_nbytes: bytes per block.
        cache: llama.cpp can keep a KV cache in it.
        cpu_cache: the same, but only on a CPU: ggml-cuda has no SET_ROWS for it and aborts the process.
        weights: gguf-py can write weights in it, without llama.cpp.
        repacked: CPUs ("arm" with dot products, "x86" with AVX2) for which llama.cpp copies such weights into another
            layout when it loads them.
    """

    name: str
    ggml_id: int
    block: int
    block_nbytes: int
    cache: bool = False
    cpu_cache: bool = False
    weights: bool = False
    repacked: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.block_nbytes / self.block

    def nbytes(self, n_values: int) -> int:
        """Bytes of a row or tensor.

        Raises:
            ValueError: the values do not divide into blocks.
        """
        if n_values % self.block:
            raise ValueError(f"{n_values} values do not divide into {self.name} blocks of {self.block}")
        return n_values // self.block * self.block_nbytes


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        each.name: each
        for each in (
            Format("f32", 0, 1, 4, cache=True, weights=True),
            Format("f16", 1, 1, 2, cache=True, weights=True),
            Format("bf16", 30, 1, 2, cache=True, weights=True),
            Format("q8_0", 8, 32, 34, cache=True, weights=True, repacked=("arm",)),
            Format("q5_1", 7, 32, 24, cache=True, weights=True),
            Format("q5_0", 6, 32, 22, cache=True, weights=True),
            Format("q4_1", 3, 32, 20, cache=True, weights=True),
            Format("q4_0", 2, 32, 18, cache=True, weights=True, repacked=("arm", "x86")),
            Format("iq4_nl", 20, 32, 18, cache=True, repacked=("arm", "x86")),
            Format("q8_1", 9, 32, 36),
            Format("q8_k", 15, SUPERBLOCK, 292),
            Format("q6_k", 14, SUPERBLOCK, 210, cpu_cache=True, repacked=("arm",)),
            Format("q5_k", 13, SUPERBLOCK, 176, cpu_cache=True, repacked=("arm",)),
            Format("q4_k", 12, SUPERBLOCK, 144, cpu_cache=True, repacked=("arm", "x86")),
            Format("q3_k", 11, SUPERBLOCK, 110),
            Format("q2_k", 10, SUPERBLOCK, 84),
            Format("iq4_xs", 23, SUPERBLOCK, 136, cpu_cache=True),
            Format("iq3_s", 21, SUPERBLOCK, 110),
            Format("iq3_xxs", 18, SUPERBLOCK, 98),
            Format("iq2_s", 22, SUPERBLOCK, 82),
            Format("iq2_xs", 17, SUPERBLOCK, 74),
            Format("iq2_xxs", 16, SUPERBLOCK, 66),
            Format("iq1_m", 29, SUPERBLOCK, 56),
            Format("iq1_s", 19, SUPERBLOCK, 50),
            Format("tq1_0", 34, SUPERBLOCK, 54),
            Format("tq2_0", 35, SUPERBLOCK, 66),
            Format("mxfp4", 39, 32, 17, cpu_cache=True),
            Format("nvfp4", 40, 64, 36, cpu_cache=True),
            Format("q1_0", 41, 128, 18),
            Format("q2_0", 42, 64, 18),
            Format("i8", 24, 1, 1),
            Format("i16", 25, 1, 2),
            Format("i32", 26, 1, 4),
            Format("i64", 27, 1, 8),
            Format("f64", 28, 1, 8),
        )
    }
)
BY_GGML_ID: Mapping[int, Format] = MappingProxyType({each.ggml_id: each for each in FORMATS.values()})
CACHE_TYPES = tuple(each.name for each in FORMATS.values() if each.cache or each.cpu_cache)
PLAIN_WEIGHTS = tuple(each.name for each in FORMATS.values() if each.weights)
UNQUANTIZED = tuple(name for name in CACHE_TYPES if FORMATS[name].block == 1)
# What `edgekv plan` tries and `edgekv inspect` shows, the widest first; two names are for K and V.
COMMON_CACHES = ("f16", "q8_0", "q8_0/q4_0", "q5_0/q4_0", "q4_0")


@dataclass(frozen=True)
class Preset:
    """A quantization preset of llama.cpp, which gives more bits to the tensors that need them.

    Which tensor gets which format is llama.cpp's choice (src/llama-quant.cpp, llama_tensor_get_type_impl). Where a
    tensor's rows do not divide into 256, the next format with blocks of 32 takes its place.

    Attributes:
        file_type: enum llama_ftype.
        base: the format of most tensors.
        importance: whether an importance matrix is ignored by the format, used, or needed: llama.cpp refuses without.
    """

    file_type: int
    base: str
    importance: Literal["ignored", "used", "needed"] = "used"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "q8_0": Preset(7, "q8_0", "ignored"),
        "q6_k": Preset(18, "q6_k"),
        "q5_k_m": Preset(17, "q5_k"),
        "q5_k_s": Preset(16, "q5_k"),
        "q5_1": Preset(9, "q5_1"),
        "q5_0": Preset(8, "q5_0"),
        "q4_k_m": Preset(15, "q4_k"),
        "q4_k_s": Preset(14, "q4_k"),
        "q4_1": Preset(3, "q4_1"),
        "q4_0": Preset(2, "q4_0"),
        "iq4_nl": Preset(25, "iq4_nl"),
        "iq4_xs": Preset(30, "iq4_xs"),
        "q3_k_l": Preset(13, "q3_k"),
        "q3_k_m": Preset(12, "q3_k"),
        "q3_k_s": Preset(11, "q3_k"),
        "iq3_m": Preset(27, "iq3_s"),
        "iq3_s": Preset(26, "iq3_s"),
        "iq3_xxs": Preset(23, "iq3_xxs", "needed"),
        "q2_k": Preset(10, "q2_k"),
        "iq2_m": Preset(29, "iq2_s", "needed"),
        "iq2_xs": Preset(20, "iq2_xs", "needed"),
    }
)
PRESET_NAMES = tuple(PRESETS)
MIXES = tuple(  # presets for which `edgekv export gguf` needs llama.cpp, but no importance matrix
    name for name in PRESETS if name not in PLAIN_WEIGHTS and PRESETS[name].importance != "needed"
)
# enum llama_ftype of a file whose weights are in one plain format
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {"f32": 0, "f16": 1, "bf16": 32}
    | {name: preset.file_type for name, preset in PRESETS.items() if name in PLAIN_WEIGHTS}
)


def fell_back(preset: Preset, columns: int, stored: str) -> bool:
    """Whether a tensor with rows of `columns` values is stored in a format of smaller blocks than the preset's."""
    return (
        FORMATS[preset.base].block == SUPERBLOCK > FORMATS[stored.lower()].block and columns % SUPERBLOCK != 0
    )
