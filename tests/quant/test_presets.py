"""The table of presets, beside llama.cpp's own."""

from __future__ import annotations

import llama_cpp.llama_cpp as api
import pytest

from edgekv.cli.quantize import WEIGHTS
from edgekv.quant.presets import PRESETS, fell_back


def test_the_command_offers_what_the_table_has() -> None:
    assert tuple(PRESETS) == WEIGHTS


@pytest.mark.parametrize("name", PRESETS)
def test_file_types_are_llama_cpps(name: str) -> None:
    assert PRESETS[name].file_type == getattr(api, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")


def test_fell_back() -> None:
    assert fell_back(PRESETS["q4_k_m"], 576, "Q5_0")
    assert not fell_back(PRESETS["q4_k_m"], 512, "Q5_0")  # then it was the preset's choice
    assert not fell_back(PRESETS["q4_k_m"], 512, "Q6_K")
    assert not fell_back(PRESETS["q4_0"], 576, "Q4_0")
