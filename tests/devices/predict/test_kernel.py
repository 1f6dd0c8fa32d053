"""The kernel's speed as plans project it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.devices.boards.profile import find_board, load_boards
from edgekv.devices.predict.kernel import (
    cached_row_s,
    kernel_decode_s,
    kernel_prefill_s,
    load_kernel_coefficients,
    shared_by,
)
from edgekv.devices.predict.speed import Workload, decode_s, load_coefficients

RESULT = Path(__file__).parents[3] / "benchmarks/results/kernel-epyc.json"
ORIGINAL = {"attention_flops": 69_120.0, "cache_values": 11_520.0, "group": 3}
LATENT = {"attention_flops": 241_920.0, "cache_values": 7_680.0, "group": 9, "latent": True}


def work(cache_type: str, latent: bool) -> Workload:
    """SmolLM2-135M, or its conversion to 192+64: 30 layers, 9 heads."""
    shape = LATENT if latent else ORIGINAL
    nbytes = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}[cache_type] * float(shape["cache_values"])
    return Workload(30, 268.96e6, 96.6e6, "Q4_1", nbytes, cache_type=cache_type, **shape)  # type: ignore[arg-type]


def test_it_is_within_a_quarter_of_what_was_measured() -> None:
    """The runs that it was fitted on, tokens/s at a depth of 7,600 on two cores at 2.45 GHz that read 15.5 GB/s."""
    from dataclasses import replace

    c = load_coefficients()["x86"]
    board = replace(find_board("intel-n100"), clock_ghz=2.45, read_gb_s={2: 15.5})
    for row in json.loads(RESULT.read_text())["rows"]:
        shape = work(row["cache"], "192+64" in row["model"])
        decode = kernel_decode_s(shape, board, 2, row["depth"], c)
        prefill = kernel_prefill_s(shape, board, 2, 64, row["depth"], c)
        assert decode is not None
        assert prefill is not None
        assert 1 / decode == pytest.approx(row["decode_edgekv"]["median"], rel=0.25)
        assert 64 / prefill == pytest.approx(row["prefill_edgekv"]["median"], rel=0.25)


def test_tokens_that_run_together_share_the_reading_of_rows() -> None:
    board, shape = find_board("intel-n100"), work("f16", latent=False)
    one, many = (cached_row_s(shape, board, 2, n) for n in (1, 512))
    assert one is not None
    assert many is not None
    assert many < one
    assert shared_by(1, 9) == 1
    assert shared_by(512, 9) == 8
    assert shared_by(512, 200) == 1


def test_a_cheaper_type_is_cheaper_and_two_types_lie_between() -> None:
    for k in load_kernel_coefficients().values():
        assert k.cycles("q4_0") < k.cycles("f16") == k.cycles("bf16")
        assert k.cycles("f16/q4_0") == pytest.approx((k.cycles("f16") + k.cycles("q4_0")) / 2)


def test_every_kind_of_cpu_has_a_rate_and_cards_have_none() -> None:
    for board in load_boards().values():
        c = load_coefficients()[board.kind]
        found = kernel_decode_s(work("q4_0", latent=True), board, board.cores, 4096, c)
        assert (found is None) == board.is_gpu
        if found is not None:
            assert found < decode_s(work("q4_0", latent=True), board, board.cores, 4096, c)


def test_the_command_shows_both_kernels(smollm2: Path) -> None:
    shown = CliRunner().invoke(cli, ["plan", str(smollm2), "--board", "pi-5"]).output
    assert "with the kernel: decode" in shown
    assert "with EdgeKV's kernel: instructions counted on an emulated core" in shown
    found = CliRunner().invoke(cli, ["plan", str(smollm2), "--board", "pi-5", "--json"])
    last = json.loads(found.output)["plan"]["speeds"][-1]
    assert last["kernel_ttft_s"] == pytest.approx(
        512 / last["kernel_prefill_tps"] + 1 / last["kernel_decode_tps"]
    )
