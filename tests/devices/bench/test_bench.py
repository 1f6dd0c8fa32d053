"""The bench on a real model in real processes: its report, its turns, its failures."""

import json
import os
import signal
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from edgekv.cli.main import cli
from edgekv.devices.bench import run as bench
from edgekv.devices.bench.bandwidth import MIN_NBYTES, read_bandwidth_gb_s, working_set_nbytes
from edgekv.devices.bench.settings import labels
from edgekv.devices.bench.worker import WorkerProcess
from edgekv.devices.bench.worker_child import repacked_nbytes, system_features
from edgekv.devices.reporting.report import Report, dumps
from edgekv.errors import BackendError, InputError, ModelFileError

SCHEMA = Path(__file__).parents[3] / "devices/reporting/report.schema.json"
QUICK = bench.BenchSettings(depths=(0, 64), n_prompt=16, n_gen=4, repeats=2, threads=1)


@pytest.fixture(scope="module")
def report(smollm2: Path) -> Report:
    candidates = [bench.Candidate(smollm2, "f16"), bench.Candidate(smollm2, "q8_0/q4_0")]
    steps: list[str] = []
    report = bench.run(candidates, QUICK, lambda done, total, text: steps.append(text))
    samples = [text for text in steps if "depth 64, sample" in text]
    kinds = [text.split(":")[0].rpartition(" ")[2] for text in samples]
    assert kinds == ["f16", "q8_0/q4_0"] * 2  # they took turns
    return report


def test_every_figure_is_there_and_plausible(report: Report) -> None:
    for run in report.runs:
        assert run.error is None
        assert [point.depth for point in run.points] == [0, 64]
        assert run.load_s is not None
        assert 0 < run.load_s < 60
        assert run.bandwidth_gb_s is not None
        assert run.bandwidth_gb_s > 0.5
        for point in run.points:
            assert point.decode_tps is not None
            assert len(point.decode_tps.samples) == 2
            assert point.decode_tps.median > 0.1
            assert point.roofline_share is not None
            assert 0 < point.roofline_share < 1.5
    assert report.settings.turns


def test_cache_bytes_are_exact(report: Report) -> None:
    # 30 layers x (3 KV heads x 64 dims) x K and V: f16 2 bytes per value, q8_0 34 and q4_0 18 bytes per 32 values.
    plain, quantized = report.runs
    assert plain.cache.nbytes_per_token == 30 * 3 * 64 * 2 * 2
    assert quantized.cache.type == "q8_0/q4_0"
    assert quantized.cache.nbytes_per_token == 30 * 3 * 64 * (34 + 18) // 32
    assert plain.memory is not None
    assert quantized.memory is not None
    assert quantized.memory.cache_nbytes == quantized.cache.nbytes_per_token * 256
    assert plain.memory.cache_nbytes == 23040 * 256  # 80 cells, rounded up by the engine to 256
    shown = plain.points[1].decode_nbytes
    assert shown is not None
    assert shown - (plain.model.read_nbytes or 0) == 23040 * (64 + 2)


def test_memory_adds_up(report: Report, smollm2: Path) -> None:
    for run in report.runs:
        memory = run.memory
        assert memory is not None
        parts = (memory.weights_nbytes, memory.cache_nbytes, memory.compute_nbytes, memory.other_nbytes)
        assert sum(part or 0 for part in parts) == memory.peak_rss_nbytes
        assert (memory.weights_nbytes or 0) >= 0.9 * smollm2.stat().st_size
        assert 20 << 20 < (memory.other_nbytes or 0) < 150 << 20


def test_the_report_fits_its_published_schema(report: Report) -> None:
    jsonschema.validate(json.loads(dumps(report)), json.loads(SCHEMA.read_text()))


def test_unknown_things_are_noted_and_not_zero(report: Report) -> None:
    for point in report.runs[0].points:
        assert point.decode_j_per_token is None or point.decode_j_per_token > 0
    if report.runs[0].energy_source is None:
        assert any("energy" in note for note in report.notes)


def test_a_worker_that_dies_is_explained() -> None:
    with WorkerProcess("victim") as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match=r"victim: .*memory"):
            worker.ask("memory")


def test_a_worker_runs_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edgekv").mkdir()
    (tmp_path / "edgekv/__init__.py").write_text("raise SystemExit('the current directory is in the way')\n")
    monkeypatch.chdir(tmp_path)
    with WorkerProcess("somewhere else") as worker:
        assert worker.ask("runtime") > 0


def test_a_dead_candidate_does_not_take_the_others_along(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = WorkerProcess.ask

    def kill_the_second(self: WorkerProcess, do: str, **arguments: object) -> object:
        if do == "prefill" and self.label.endswith("q8_0"):
            os.kill(self.pid, signal.SIGKILL)
        return ask(self, do, **arguments)

    monkeypatch.setattr(WorkerProcess, "ask", kill_the_second)
    settings = bench.BenchSettings(depths=(0,), n_prompt=4, n_gen=2, repeats=1, threads=1)
    report = bench.run([bench.Candidate(smollm2, "f16"), bench.Candidate(smollm2, "q8_0")], settings)
    assert report.runs[0].error is None
    assert report.runs[0].points[0].decode_tps is not None
    assert "killed" in (report.runs[1].error or "")
    assert report.runs[1].points == ()


def test_command_writes_the_report_and_prints_tables(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    options = ["-d", "0", "-p", "8", "-n", "2", "-r", "1", "-t", "1", "-o", str(out)]
    result = CliRunner().invoke(cli, ["bench", str(smollm2), *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "decode t/s" in result.stdout
    assert "peak RSS" in result.stdout
    assert json.loads(out.read_text())["runs"][0]["model"]["file"] == smollm2.name
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (bench.BenchSettings(depths=()), "depths"),
        (bench.BenchSettings(depths=(-1,)), "depths"),
        (bench.BenchSettings(n_gen=0), "at least 1"),
        (bench.BenchSettings(cpus=(4095,)), "CPU 4095"),
    ],
)
def test_impossible_settings(smollm2: Path, settings: bench.BenchSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.run([bench.Candidate(smollm2)], settings)


def test_bad_models_are_refused_before_anything_runs(smollm2: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:1000])
    with pytest.raises(ModelFileError):
        bench.run([bench.Candidate(smollm2), bench.Candidate(cut)], QUICK)
    with pytest.raises(InputError, match="unknown cache type"):
        bench.run([bench.Candidate(smollm2, "q9_9")], QUICK)
    with pytest.raises(InputError, match="q8_0/q6_k: V: 64 values per head do not divide into q6_k blocks"):
        bench.run([bench.Candidate(smollm2, "q8_0/q6_k")], QUICK)


def test_labels_are_unique() -> None:
    twice = [
        bench.Candidate(Path("a.gguf")),
        bench.Candidate(Path("b/a.gguf")),
        bench.Candidate(Path("c.gguf")),
    ]
    assert labels(twice) == ["a f16 #1", "a f16 #2", "c f16"]


def test_bandwidth_is_measured_and_its_array_bounded() -> None:
    assert read_bandwidth_gb_s(MIN_NBYTES, threads=1, seconds=0.05) > 0.2
    assert working_set_nbytes(100 << 20, None) == 100 << 20
    assert working_set_nbytes(4 << 30, 400 << 20) == 50 << 20  # an eighth of a small board's free memory
    assert working_set_nbytes(1, None) == MIN_NBYTES


def test_engine_log_and_features() -> None:
    log = (
        "load_tensors:   CPU_REPACK model buffer size =    95.34 MiB\n"
        "load_tensors:   CPU_Mapped model buffer size =    92.10 MiB\n"
    )
    assert repacked_nbytes(log) == round(95.34 * 2**20)
    assert system_features("CPU : SSE3 = 1 | AVX = 0 | REPACK = 1 | ") == ["SSE3", "REPACK"]


def test_an_onnx_folder_takes_turns_with_a_gguf(tiny_mla: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "tiny-onnx", tmp_path / "run.json"
    exported = CliRunner().invoke(
        cli, ["export", "onnx", str(tiny_mla), "-o", str(folder), "--cache-type", "int8"]
    )
    assert exported.exit_code == 0, exported.output
    options = ["-d", "0,32", "-p", "8", "-n", "4", "-r", "1", "-t", "1", "-o", str(output)]
    result = CliRunner().invoke(cli, ["bench", str(tiny_mla), str(folder), *options])
    assert result.exit_code == 0, result.output
    theirs, ours = json.loads(output.read_text())["runs"]
    assert (theirs["engine"], ours["engine"]) == ("llama.cpp", "onnx")
    assert (theirs["cache"]["type"], ours["cache"]["type"]) == ("f16", "int8")
    assert theirs["model"]["flops"] == ours["model"]["flops"]
    assert ours["cache"]["nbytes_per_token"] == 3 * (64 + 4)
    assert ours["memory"]["cache_nbytes"] == 40 * 3 * (64 + 4)
    assert [point["depth"] for point in ours["points"]] == [0, 32]
    wrong = bench.Candidate(folder, "f16", "onnx")
    with pytest.raises(InputError, match="exported with a cache in int8"):
        bench.run([wrong], QUICK)


def test_a_sample_of_a_model_with_a_window_leaves_its_depth(tiny_gemma: Path) -> None:
    """900 tokens push the first ones out of the window's cells: they are run anew, or the next sample starts at 0."""
    from edgekv.devices.bench.worker_child import Worker

    worker = Worker()
    worker.open(str(tiny_gemma), "llama.cpp", 2048, "f16", 1, [], None)
    worker.fill(100)
    for measure in (worker.prefill, worker.decode):
        assert measure(900) > 0
        assert worker._backend.n_past == 100
    worker.fill(1000)
    worker.fill(20)
    assert worker._backend.n_past == 20
    worker._backend.close()


def test_bytes_of_a_model_with_a_window_are_those_it_reads_and_holds(tiny_gemma: Path) -> None:
    settings = bench.BenchSettings(
        depths=(1000,), n_prompt=16, n_gen=4, repeats=1, threads=1, context=2048, with_hash=False
    )
    (run,) = bench.run([bench.Candidate(tiny_gemma, "f16")], settings).runs
    layer = 2 * 2 * 32 * 2  # bytes of one token: K and V of two heads in f16
    assert (run.cache.nbytes_per_token, run.cache.window_nbytes_per_token, run.cache.window) == (
        3 * layer,
        2 * layer,
        64,
    )
    assert run.memory is not None
    assert run.memory.cache_nbytes == layer * (2048 + 2 * 768)
    shown, read = run.points[0].decode_nbytes, run.model.read_nbytes
    assert shown is not None
    assert read is not None
    assert shown == read + layer * (1002 + 2 * 64)
