"""The table of formats, beside gguf-py's constants, llama.cpp's library and the lists that are made of it."""

from __future__ import annotations

import ctypes
from typing import Any, get_args

import gguf
import llama_cpp.llama_cpp as api
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from edgekv.devices.predict.choices import WEIGHTS
from edgekv.devices.predict.speed import weight_family
from edgekv.evaluate.model_under_test import Weights
from edgekv.heal.recipe import CacheType
from edgekv.quant.cache_format import CacheFormat
from edgekv.quant.formats import (
    BY_GGML_ID,
    CACHE_TYPES,
    COMMON_CACHES,
    FILE_TYPES,
    FORMATS,
    KEEP,
    MIXES,
    PLAIN_WEIGHTS,
    PRESETS,
    UNQUANTIZED,
    Format,
    fell_back,
)

GGML_TYPE_COUNT = 43


def ggml() -> Any:
    """The library that llama.cpp computes with."""
    lib: Any = api._lib
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_name.restype = ctypes.c_char_p
    return lib


def test_ids_and_blocks_are_ggmls_own() -> None:
    lib = ggml()
    known = {}
    for kind in range(GGML_TYPE_COUNT):
        if block := lib.ggml_blck_size(kind):
            known[kind] = (lib.ggml_type_name(kind).decode().lower(), block, lib.ggml_type_size(kind))
    assert {i: (each.name, each.block, each.block_nbytes) for i, each in BY_GGML_ID.items()} == known


@pytest.mark.parametrize("each", FORMATS.values(), ids=FORMATS)
def test_gguf_py_has_the_same_numbers(each: Format) -> None:
    if each.name.upper() not in QuantType.__members__:
        pytest.skip(f"this gguf-py has no {each.name}")
    kind = QuantType[each.name.upper()]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if (
        each.name == "q8_1"
    ):  # for activations, in no file: ggml keeps its two scales in float16, gguf-py counts float32
        nbytes -= 4
    assert (each.ggml_id, each.block, each.block_nbytes) == (kind, block, nbytes)


def test_gguf_py_has_nothing_more() -> None:
    assert {kind.name.lower() for kind in QuantType} <= set(FORMATS)


@pytest.mark.parametrize("name", PLAIN_WEIGHTS)
def test_gguf_py_writes_plain_weights(name: str) -> None:
    written = gguf.quants.quantize(np.ones((2, 64), np.float32), QuantType[name.upper()])
    assert written.nbytes == 2 * FORMATS[name].nbytes(64)


@pytest.mark.parametrize("name", sorted(PRESETS | FILE_TYPES))
def test_file_types_are_llama_cpps(name: str) -> None:
    file_type = PRESETS[name].file_type if name in PRESETS else FILE_TYPES[name]
    prefix = "ALL" if name == "f32" else "MOSTLY"
    assert file_type == getattr(api, f"LLAMA_FTYPE_{prefix}_{name.upper()}")
    assert file_type == gguf.LlamaFileType[f"{prefix}_{name.upper()}"]


def test_lists_made_of_the_table() -> None:
    everywhere = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    assert (*everywhere, "q6_k", "q5_k", "q4_k", "iq4_xs", "mxfp4", "nvfp4") == CACHE_TYPES
    assert PLAIN_WEIGHTS == everywhere[:-1] == tuple(FILE_TYPES)
    assert UNQUANTIZED == ("f32", "f16", "bf16")
    assert (
        *("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s"),
        *("iq3_m", "iq3_s", "q2_k"),
    ) == MIXES
    assert {preset.base for preset in PRESETS.values()} <= set(FORMATS)


def test_choices_spelt_out_elsewhere_are_in_the_table() -> None:
    """Literals for type checkers, and what plans try."""
    assert set(get_args(CacheType)) <= set(CACHE_TYPES)
    assert [str(CacheFormat.parse(name)) for name in COMMON_CACHES] == list(COMMON_CACHES)
    assert {*get_args(Weights), *WEIGHTS} <= {KEEP, *PLAIN_WEIGHTS}


@pytest.mark.parametrize("name", PRESETS)
def test_families_of_kernels_follow_the_block(name: str) -> None:
    base = FORMATS[PRESETS[name].base]
    family = "low" if base.bits < 4 else "k" if base.name.endswith("_k") else "q8" if base.bits > 8 else "q4"
    assert weight_family(name.upper()) == family


def test_nbytes() -> None:
    assert FORMATS["q5_1"].nbytes(64) == 48
    assert FORMATS["q5_1"].bits == 6
    with pytest.raises(ValueError, match="48 values do not divide into q4_0 blocks of 32"):
        FORMATS["q4_0"].nbytes(48)


def test_fell_back() -> None:
    assert fell_back(PRESETS["q4_k_m"], 576, "Q5_0")
    assert not fell_back(PRESETS["q4_k_m"], 512, "Q5_0")  # then it was the preset's choice
    assert not fell_back(PRESETS["q4_k_m"], 512, "Q6_K")
    assert not fell_back(PRESETS["q4_0"], 576, "Q4_0")
