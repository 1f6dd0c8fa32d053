"""Quantized files, against gguf-py's bytes and the reference's logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from gguf import GGMLQuantizationType as QuantType

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.errors import BackendError, InputError
from edgekv.export.gguf.quantize import quantize_gguf
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.quant.formats import PRESETS
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.source import LazySource, TensorSource

TOKENS = np.random.default_rng(3).integers(0, 256, 48).tolist()


def nothing(done: int, total: int) -> None:
    pass


def quantize(source: Path, output: Path, preset: str, importance: dict[str, np.ndarray] | None = None):  # type: ignore[no-untyped-def]
    return quantize_gguf(source, output, preset, importance or {}, Quantizer(source, 1), False, nothing)


def kl(a: Path, b: Path) -> float:
    logs = []
    for path in (a, b):
        model = ReferenceModel(open_model(path))
        logs.append(log_softmax(model.logits(model.hidden(TOKENS, model.new_cache(48)))))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("preset", ["q8_0", "q4_0", "q5_1"])
def test_bytes_are_gguf_pys(tiny_llama: Path, tmp_path: Path, preset: str) -> None:
    reports = quantize(tiny_llama, tmp_path / "out.gguf", preset)
    before, after = open_model(tiny_llama), open_model(tmp_path / "out.gguf")
    kind = QuantType[preset.upper()]
    name = "blk.1.ffn_up.weight"
    assert after.quantization(name) == kind.name
    np.testing.assert_array_equal(after.raw(name), gguf.quants.quantize(before.load(name), kind))
    report = next(report for report in reports if report.name == name)
    error = before.load(name) - after.load(name)
    assert report.error is not None
    assert report.error.rms == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(before.load(name)), rel=1e-4
    )
    assert {report.name for report in reports} == {n for n in before.names() if len(before.shape(n)) > 1}


@pytest.mark.parametrize("preset", ["q8_0", "q4_k_m", "iq4_nl"])
def test_a_folded_latent_survives(tiny_mla: Path, tmp_path: Path, preset: str) -> None:
    """Its encoder keeps its type: under f16 block scales it would become zero."""
    reports = quantize(tiny_mla, tmp_path / "out.gguf", preset)
    after = open_model(tmp_path / "out.gguf")
    assert after.quantization("blk.0.attn_kv_a_mqa.weight") == "F32"
    assert after.quantization("blk.0.attn_v_b.weight") != "F32"
    assert after.quantization("blk.0.attn_k_b.weight") == "F16"  # 16 columns divide into no block
    assert kl(tiny_mla, tmp_path / "out.gguf") < (0.01 if preset == "q8_0" else 0.7)
    assert any(report.fell_back for report in reports) == (preset == "q4_k_m")


def test_a_folded_latent_would_not_survive_by_itself(tiny_mla: Path, tmp_path: Path) -> None:
    Quantizer(tiny_mla, 1).quantize(tmp_path / "out.gguf", PRESETS["q8_0"].file_type, {}, {}, nothing)
    assert kl(tiny_mla, tmp_path / "out.gguf") > 0.1


def test_bf16_source(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource], tmp_path: Path
) -> None:
    write_gguf(make_mla(make_llama(), 32, 32), tmp_path / "a.gguf", "bf16", {}, False, lambda *_: None)
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    assert open_model(tmp_path / "b.gguf").quantization("blk.0.attn_kv_a_mqa.weight") == "BF16"
    assert kl(tmp_path / "a.gguf", tmp_path / "b.gguf") < 0.01


def test_importance_lowers_the_error_that_counts(tiny_llama: Path, tmp_path: Path) -> None:
    """Inputs of very different sizes: the weighted error falls, at some cost elsewhere."""
    rng = np.random.default_rng(0)
    source = open_model(tiny_llama)
    importance = {
        name: np.exp(2 * rng.standard_normal(source.shape(name)[-1])).astype(np.float32)
        for name in source.names()
        if name.startswith("blk.") and len(source.shape(name)) > 1
    }
    with_it = quantize(tiny_llama, tmp_path / "with.gguf", "q4_0", importance)
    quantize(tiny_llama, tmp_path / "without.gguf", "q4_0")
    plain = open_model(tmp_path / "without.gguf")
    for report in with_it:
        if report.name in importance:
            assert report.error is not None
            assert report.error.weighted is not None
            weights, exact = importance[report.name], source.load(report.name)
            error = np.square(exact - plain.load(report.name)) * weights
            assert report.error.weighted < np.sqrt(error.sum() / (np.square(exact) * weights).sum())


def test_presets_that_need_importance(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="useless without an importance matrix"):
        quantize(tiny_llama, tmp_path / "out.gguf", "iq2_xs")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_an_error_and_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    def crash(done: int, total: int) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # one that has just ended
                if "edgekv.backends.isolated.quantizer_child" in child.cmdline():
                    child.send_signal(11)

    with pytest.raises(BackendError, match="SIGSEGV"):
        quantize_gguf(smollm2, tmp_path / "out.gguf", "q4_k_m", {}, Quantizer(smollm2, 1), False, crash)
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_refuses_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.add_tensor("a.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BackendError, match=r"could not quantize .*no-such-architecture"):
        quantize(tmp_path / "odd.gguf", tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()
