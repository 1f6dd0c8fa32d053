"""Workflows called from Python: a request in, progress told, a result back; nothing runs if the output is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

import edgekv
from edgekv.errors import OutputError
from edgekv.models.open import open_model
from edgekv.progress import Stages
from edgekv.workflows.bench import BenchSettings
from edgekv.workflows.evaluate import Effort
from edgekv.workflows.sweep import SweepSpec


def n_tensors(path: str | Path) -> int:
    return len(gguf.GGUFReader(path).tensors)


def test_convert(tiny_llama: Path, text: Path, tmp_path: Path, seen: Any) -> None:
    output = str(tmp_path / "small.gguf")
    result = edgekv.convert_model(
        edgekv.ConvertRequest(
            str(tiny_llama), output, kv_lora_rank=32, rope_dim=32, text=(str(text),), text_tokens=256
        ),
        seen,
    )
    assert result.output == Path(output)
    assert result.nbytes == result.output.stat().st_size
    assert result.cache_nbytes == (3 * 128 * 2, 3 * 64 * 2)
    assert [loss.layer for loss in result.layers] == [0, 1, 2]
    assert {"converting", "writing"} <= seen.finished
    assert open_model(result.output).spec.layers[0].attention.kind == "MLA"


def test_quantize(tiny_llama: Path, tmp_path: Path, seen: Any) -> None:
    output = str(tmp_path / "q8.gguf")
    request = edgekv.QuantizeRequest(str(tiny_llama), output, "q8_0", importance=False)
    result = edgekv.quantize_model(request, seen)
    before, after = result.nbytes
    assert (before, after) == (tiny_llama.stat().st_size, Path(output).stat().st_size)
    assert after < before
    assert n_tensors(output) == n_tensors(tiny_llama)
    matrices = {tensor.name for tensor in gguf.GGUFReader(tiny_llama).tensors if len(tensor.shape) > 1}
    assert {tensor.name for tensor in result.tensors} == matrices, "norms stay as they are"
    assert "quantizing" in seen.finished


def test_export_gguf(tiny_llama: Path, tmp_path: Path, seen: Any) -> None:
    output = str(tmp_path / "out.gguf")
    result = edgekv.export_model(edgekv.ExportGGUFRequest(str(tiny_llama), output, "f16"), seen)
    assert (result.weights, result.architecture, result.nbytes) == (
        "f16",
        "llama",
        Path(output).stat().st_size,
    )
    assert n_tensors(output) == n_tensors(tiny_llama)
    assert "writing" in seen.finished


def test_export_onnx(tiny_mla: Path, tmp_path: Path, seen: Any) -> None:
    output = str(tmp_path / "onnx")
    manifest = edgekv.export_model(edgekv.ExportOnnxRequest(str(tiny_mla), output, "f32"), seen)
    assert manifest.model.cache_type == "f32"
    assert {name for name in manifest.files if not (Path(output) / name).exists()} == set()
    assert "exporting" in seen.finished


def test_export_safetensors(tiny_mla: Path, tmp_path: Path, seen: Any) -> None:
    output = str(tmp_path / "hf")
    result = edgekv.export_model(edgekv.ExportSafetensorsRequest(str(tiny_mla), output), seen)
    sizes = {name: (Path(output) / name).stat().st_size for name in result.nbytes}
    assert result.nbytes == sizes
    assert "config.json" in sizes
    assert "writing" in seen.finished


def test_export_wants_a_format() -> None:
    with pytest.raises(edgekv.InputError, match="ExportGGUFRequest"):
        edgekv.export_model("model.gguf")


def test_verify(tiny_llama: Path, text: Path, seen: Any) -> None:
    request = edgekv.VerifyRequest(str(tiny_llama), text=str(text), text_tokens=32)
    result = edgekv.verify_models(request, seen)
    assert result.tokens == 32
    assert 0 <= result.kl < 1e-5
    assert seen.steps[-1] == ("comparing", 32, 32)


def test_evaluate(tiny_llama: Path, tiny_mla: Path, text: Path, tmp_path: Path, seen: Any) -> None:
    wanted = edgekv.Measurements(text=str(text), window=64, limit=2)
    effort = Effort(threads=1, jobs=1, cache_dir=str(tmp_path / "cache"))
    lines: list[str] = []
    request = edgekv.EvaluateRequest(str(tiny_mla), wanted, against=str(tiny_llama), effort=effort)
    report = edgekv.evaluate_model(request, seen, lines.append)
    assert report.windows is not None
    assert report.windows.kl is not None
    assert report.windows.kl > 0.01
    assert lines[0].startswith("tiny-mla.gguf")
    assert seen.finished == {"reference", "windows"}
    assert list((tmp_path / "cache").iterdir())


def test_names_of_tasks_stay_text() -> None:
    wanted = edgekv.Measurements(tasks=(("piqa", "p.jsonl"),), text="t.txt")
    found = edgekv.EvaluateRequest("m.gguf", wanted).measurements
    assert found.tasks == (("piqa", Path("p.jsonl")),)
    assert (found.text, found.positions) == (Path("t.txt"), None)


def test_sweep(tiny_llama: Path, text: Path, tmp_path: Path, seen: Any) -> None:
    spec = SweepSpec(str(tiny_llama), text.name, cache_types=("f16", "q8_0"), window=64)
    request = edgekv.SweepRequest(
        spec,
        folder=str(text.parent),
        output=str(tmp_path / "out"),
        conversions={},
        limit=1,
        effort=Effort(threads=1, jobs=1, cache_dir=tmp_path / "cache"),
    )
    report = edgekv.sweep_models(request, seen)
    assert [point.cache_type for point in report.points] == ["f16", "q8_0"]
    assert {"reference", "original f16", "original q8_0"} <= seen.finished
    assert {path.name for path in tmp_path.glob("out.*")} == {"out.json", "out.md", "out.svg"}


def test_bench(tiny_llama: Path, tmp_path: Path) -> None:
    settings = BenchSettings(depths=(0,), n_prompt=8, n_gen=2, repeats=1)
    told: list[tuple[int, int]] = []
    output = tmp_path / "run.json"
    request = edgekv.BenchRequest((str(tiny_llama),), ("f16",), settings, output=str(output))
    report = edgekv.bench_models(request, lambda done, total, figures="": told.append((done, total)))
    assert [len(run.points) for run in report.runs] == [1]
    assert told[-1][0] == told[-1][1]
    assert '"edgekv.bench_models"' in output.read_text()


def test_plan(tiny_llama: Path) -> None:
    result = edgekv.plan_board(edgekv.PlanRequest(str(tiny_llama), board="pi-5", ctx_size=512))
    assert result.plan.fits
    assert result.plan.context == 512
    assert all(other.fits for other in result.recommended)


def test_chat(tiny_llama: Path) -> None:
    request = edgekv.ChatRequest(str(tiny_llama), ctx_size=256, threads=1, max_tokens=4)
    with edgekv.open_chat(request) as chat:
        assert chat.has_template
        *_, last = chat.ask("cde")
        assert last.timings is not None
        assert isinstance(chat.answer("fgh"), str)


Work = Callable[[Path, Path, Stages], object]
WORKS: dict[str, Work] = {
    "convert": lambda model, taken, seen: edgekv.convert_model(
        edgekv.ConvertRequest(model, taken, target=0.5), seen
    ),
    "quantize": lambda model, taken, seen: edgekv.quantize_model(
        edgekv.QuantizeRequest(model, taken, "q4_k_m"), seen
    ),
    "gguf": lambda model, taken, seen: edgekv.export_model(edgekv.ExportGGUFRequest(model, taken), seen),
    "onnx": lambda model, taken, seen: edgekv.export_model(edgekv.ExportOnnxRequest(model, taken), seen),
    "safetensors": lambda model, taken, seen: edgekv.export_model(
        edgekv.ExportSafetensorsRequest(model, taken), seen
    ),
    "bench": lambda model, taken, seen: edgekv.bench_models(
        edgekv.BenchRequest((model,), output=taken), seen("bench")
    ),
    "heal": lambda model, taken, seen: edgekv.heal_model(
        edgekv.HealRequest(model, taken, target=0.5, self_tokens=10**9, minutes=1), print, seen
    ),
    "sweep": lambda model, taken, seen: edgekv.sweep_models(
        edgekv.SweepRequest(
            SweepSpec(str(model), "none.txt"), taken.parent, taken.with_suffix(""), conversions={}
        ),
        seen,
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_an_output_that_exists_is_refused_before_any_work(
    name: str, tiny_mla: Path, tiny_llama: Path, tmp_path: Path, seen: Any
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    with pytest.raises(OutputError, match="taken"):
        WORKS[name](tiny_mla if name == "safetensors" else tiny_llama, taken, seen)
    assert seen.steps == []
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]
