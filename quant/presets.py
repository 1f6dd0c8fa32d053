"""llama.cpp's quantization presets by name: each mixes formats, more bits where a tensor needs them.

Which tensor gets which format is llama.cpp's choice (src/llama-quant.cpp, llama_tensor_get_type_impl). Where
a tensor's rows do not divide into 256, the next format with blocks of 32 takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import gguf
from gguf import LlamaFileType as FileType

SUPERBLOCK = 256  # values: the block of K- and most I-formats


@dataclass(frozen=True)
class Preset:
    """A preset: `file_type` is enum llama_ftype, `base` the format that most tensors get.

    importance: "ignored" by the format, "helps", or "needed", without which llama.cpp refuses.
    """

    file_type: int
    base: str
    importance: str = "helps"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "q8_0": Preset(FileType.MOSTLY_Q8_0, "Q8_0", "ignored"),
        "q6_k": Preset(FileType.MOSTLY_Q6_K, "Q6_K"),
        "q5_k_m": Preset(FileType.MOSTLY_Q5_K_M, "Q5_K"),
        "q5_k_s": Preset(FileType.MOSTLY_Q5_K_S, "Q5_K"),
        "q5_1": Preset(FileType.MOSTLY_Q5_1, "Q5_1"),
        "q5_0": Preset(FileType.MOSTLY_Q5_0, "Q5_0"),
        "q4_k_m": Preset(FileType.MOSTLY_Q4_K_M, "Q4_K"),
        "q4_k_s": Preset(FileType.MOSTLY_Q4_K_S, "Q4_K"),
        "q4_1": Preset(FileType.MOSTLY_Q4_1, "Q4_1"),
        "q4_0": Preset(FileType.MOSTLY_Q4_0, "Q4_0"),
        "iq4_nl": Preset(FileType.MOSTLY_IQ4_NL, "IQ4_NL"),
        "iq4_xs": Preset(FileType.MOSTLY_IQ4_XS, "IQ4_XS"),
        "q3_k_l": Preset(FileType.MOSTLY_Q3_K_L, "Q3_K"),
        "q3_k_m": Preset(FileType.MOSTLY_Q3_K_M, "Q3_K"),
        "q3_k_s": Preset(FileType.MOSTLY_Q3_K_S, "Q3_K"),
        "iq3_m": Preset(FileType.MOSTLY_IQ3_M, "IQ3_S"),
        "iq3_s": Preset(FileType.MOSTLY_IQ3_S, "IQ3_S"),
        "iq3_xxs": Preset(FileType.MOSTLY_IQ3_XXS, "IQ3_XXS", "needed"),
        "q2_k": Preset(FileType.MOSTLY_Q2_K, "Q2_K"),
        "iq2_m": Preset(FileType.MOSTLY_IQ2_M, "IQ2_S", "needed"),
        "iq2_xs": Preset(FileType.MOSTLY_IQ2_XS, "IQ2_XS", "needed"),
    }
)


def fell_back(preset: Preset, columns: int, stored: str) -> bool:
    """Whether rows of `columns` values kept a tensor, now `stored`, from a format of superblocks."""
    wanted, got = (
        gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] for name in (preset.base, stored)
    )
    return wanted == SUPERBLOCK > got and columns % SUPERBLOCK != 0
