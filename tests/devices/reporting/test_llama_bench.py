"""llama-bench's results as people keep them: sweeps, several machines, other encodings, logs around the JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.devices.reporting.compare import load_sources
from edgekv.devices.reporting.tables import entries, provenance_table, warnings
from edgekv.errors import InputError

Test = dict[str, Any]
Save = Callable[..., Path]
COMMON = {"model_filename": "models/a.gguf", "model_type": "llama 1B Q4_0", "type_k": "f16", "type_v": "f16"}
COMMON |= {"cpu_info": "board", "build_commit": "abc", "n_threads": 4, "n_gpu_layers": 0}


def timed(speed: float, n_gen: int = 128, n_prompt: int = 0, **other: Any) -> Test:
    return COMMON | {"n_prompt": n_prompt, "n_gen": n_gen, "avg_ts": speed, "samples_ts": [speed] * 2} | other


PLAIN = [timed(60.0, 0, 512), timed(10.0)]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def saved(
        value: Any, name: str = "bench.json", encoding: str = "utf-8", before: str = "", after: str = ""
    ) -> Path:
        text = value if isinstance(value, str) else json.dumps(value, indent=2)
        (tmp_path / name).write_bytes((before + text + after).encode(encoding))
        return tmp_path / name

    return saved


def speeds(path: Path) -> dict[str, float]:
    """Decode speed by row name."""
    rows = entries(load_sources([path]))
    return {row.name: p.decode_tps.median for row in rows for p in row.run.points if p.decode_tps}


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("n_batch", (128, 2048), ("b128", "b2048")),
        ("n_ubatch", (64, 512), ("ub64", "ub512")),
        ("flash_attn", (False, True), ("fa0", "fa1")),
        ("use_mmap", (1, 0), ("mmap1", "mmap0")),
        ("no_kv_offload", (True, False), ("nkvo1", "nkvo0")),
        ("tensor_buft_overrides", ("none", "exps=CPU"), ("ot=none", "ot=exps=CPU")),
        ("n_cpu_moe", (0, 8), ("ncmoe0", "ncmoe8")),
        ("devices", ("CUDA0", "CUDA1"), ("dev=CUDA0", "dev=CUDA1")),
        ("split_mode", ("layer", "row"), ("sm=layer", "sm=row")),
        ("n_gpu_layers", (-1, 99), ("ngl=-1", "ngl99")),
        ("an_option_of_next_year", ([1], [2]), ("an-option-of-next-year=[1]", "an-option-of-next-year=[2]")),
        ("build_number", (6000, 6400), ("build6000", "build6400")),
        ("build_commit", ("aaa", "bbb"), ("aaa", "bbb")),
        ("cpu_info", ("Pi 4", "Pi 5"), ("Pi 4", "Pi 5")),
        ("model_type", ("llama 1B Q4_0", "llama 1B Q8_0"), ("llama 1B Q4_0", "llama 1B Q8_0")),
    ],
)
def test_a_sweep_gives_a_run_for_each_value(
    save: Save, field: str, values: tuple[Any, Any], said: tuple[str, str]
) -> None:
    path = save([timed(10.0, **{field: values[0]}), timed(12.0, **{field: values[1]})])
    assert speeds(path) == {f"a f16 t4 {said[0]}": 10.0, f"a f16 t4 {said[1]}": 12.0}


def test_keys_and_values_have_types_of_their_own(save: Save) -> None:
    kinds = [("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q8_0"), ("", "")]
    path = save([timed(float(10 + i), type_k=k, type_v=v) for i, (k, v) in enumerate(kinds)])
    assert list(speeds(path)) == ["a q8_0 t4", "a q8_0/q4_0 t4", "a q4_0/q8_0 t4", "a f16 t4"]
    (source,) = load_sources([path])
    assert [run.cache.type for run in source.report.runs] == ["q8_0", "q8_0/q4_0", "q4_0/q8_0", "f16"]


def test_two_options_at_once_are_both_told(save: Save) -> None:
    sweep = [timed(t + f, n_threads=t, flash_attn=bool(f)) for t in (2, 4) for f in (0, 1)]
    assert speeds(save(sweep)) == {f"a f16 t{t} fa{f}": t + f for t in (2, 4) for f in (0, 1)}
    coupled = [timed(2.0, n_threads=2, n_ubatch=64), timed(4.0, n_threads=4, n_ubatch=512)]
    assert list(speeds(save(coupled))) == ["a f16 t2 ub64", "a f16 t4 ub512"]


def test_each_row_has_its_own_threads_machine_and_build(save: Save) -> None:
    tests = [timed(6.0, n_threads=2), timed(10.0), timed(20.0, cpu_info="other", build_commit="def")]
    sources = load_sources([save(tests)])
    table = provenance_table(entries(sources))
    columns = [table.head.index(name) for name in ("machine", "engine", "threads")]
    assert [tuple(row[i] for i in columns) for row in table.rows] == [
        ("board", "llama-bench build abc", "2"),
        ("board", "llama-bench build abc", "4"),
        ("other", "llama-bench build def", "4"),
    ]
    assert "different machines are compared: board, other" in warnings(sources)


@pytest.mark.parametrize("folders", [("q4/", "q8/"), ("C:\\q4\\", "C:\\q8\\"), ("/m/q4/x/", "/m/q8/x/")])
def test_files_of_one_name_keep_the_folder_that_differs(save: Save, folders: tuple[str, str]) -> None:
    path = save(
        [
            timed(10.0, model_filename=f"{folders[0]}a.gguf"),
            timed(6.0, model_filename=f"{folders[1]}a.gguf", model_type="llama 1B Q8_0"),
        ]
    )
    deeper = "x/" if "x" in folders[0] else ""
    assert speeds(path) == {f"q4/{deeper}a f16 t4": 10.0, f"q8/{deeper}a f16 t4": 6.0}
    assert f"different models are compared: q4/{deeper}a.gguf, q8/{deeper}a.gguf" in warnings(
        load_sources([path])
    )


def test_two_models_under_one_file_name_are_named(save: Save) -> None:
    said = warnings(load_sources([save([timed(1.0), timed(2.0, model_type="llama 3B Q8_0")])]))
    assert "different models are compared: a.gguf (llama 1B Q4_0), a.gguf (llama 3B Q8_0)" in said


def test_a_test_that_ran_twice_counts_with_all_its_samples(save: Save) -> None:
    (source,) = load_sources([save([*PLAIN, timed(14.0, test_time="later")])])
    (run,) = source.report.runs
    assert run.points[0].decode_tps is not None
    assert run.points[0].decode_tps.samples == (10.0, 10.0, 14.0, 14.0)
    assert any(
        "tg128 at depth 0 was timed in 2 tests: all samples count" in note for note in source.report.notes
    )


LOG = "ggml_vulkan: Found 1 devices\n[1/2] warming up\n0.00.123 I main: {} load\n"
FORMS: dict[str, dict[str, Any]] = {
    "UTF-16 with BOM": {"value": PLAIN, "encoding": "utf-16"},
    "UTF-16 without BOM": {"value": PLAIN, "encoding": "utf-16-be"},
    "BOM": {"value": PLAIN, "encoding": "utf-8-sig"},
    "JSON lines": {"value": "".join(json.dumps(test) + "\r\n" for test in PLAIN)},
    "objects on several lines": {"value": "\n".join(json.dumps(test, indent=1) for test in PLAIN)},
    "arrays one after the other": {"value": "\n".join(json.dumps([test]) for test in PLAIN)},
    "array of arrays": {"value": [[test] for test in PLAIN]},
    "log before": {"value": PLAIN, "before": LOG},
    "log behind": {"value": PLAIN, "after": "\n\nbuild: 0badc0de (6264)\n"},
    "log between, from Windows": {
        "value": json.dumps(PLAIN, indent=2).replace("},\n", "},\n" + LOG).replace("\n", "\r\n"),
        "encoding": "utf-16",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_however_it_was_saved(save: Save, form: str) -> None:
    (source,) = load_sources([save(**FORMS[form])])
    (run,) = source.report.runs
    (point,) = run.points
    assert point.prefill_tps is not None
    assert point.decode_tps is not None
    assert (point.prefill_tps.median, point.decode_tps.median) == (60.0, 10.0)
    assert any("not JSON were skipped" in note for note in source.report.notes) == form.startswith("log")


def test_one_object_is_one_test(save: Save) -> None:
    assert speeds(save(PLAIN[1])) == {"a f16 t4": 10.0}


def test_a_report_of_edgekv_may_be_in_utf_16_too(save: Save) -> None:
    report = (Path(__file__).parent / "reports/measured.json").read_text()
    assert len(entries(load_sources([save(report, encoding="utf-16")]))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(PLAIN, indent=2)[:-1], "cut short: its JSON does not end; run the bench again"),
        (json.dumps(PLAIN, indent=2)[:-2] + ",\n", "cut short"),
        (LOG + json.dumps(PLAIN, indent=2)[:200], "cut short"),
        (json.dumps(PLAIN[0]) + "\n" + json.dumps(PLAIN[1])[:-9], "cut short"),
        ("| model | test | t/s |\n| --- | --- | --- |\n", "table in Markdown; run it with `-o json`"),
        (LOG + "| model | test |     t/s |\n", "table in Markdown; run it with `-o json`"),
        ('build_commit,build_number\n"0badc0de","6264"\n', "CSV; run it with `-o json`"),
        ("CREATE TABLE IF NOT EXISTS test (\n", "SQL; run it with `-o json`"),
        (LOG, "holds no JSON"),
        ("", "holds no JSON"),
        ("[]", "empty list: llama-bench finished no test"),
        ("[1]", "not an EdgeKV report"),
        ('{"a": 1}', "not an EdgeKV report"),
        (json.dumps([*PLAIN, {"a": 1}]), "not an EdgeKV report"),
        (json.dumps(PLAIN).replace("10.0", "inf"), "is not valid JSON"),
        (json.dumps(PLAIN).replace("10.0", "1" * 400), "bench.json: |bench.json is not valid JSON"),
        ("[" * 100_000, "nested too deeply|cut short"),
    ],
)
def test_what_cannot_be_read_is_told_for_what_it_is(save: Save, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_sources([save(content)])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(save: Save) -> None:
    path = save(PLAIN)
    path.write_bytes(path.read_bytes().replace(b"board", b"Intel\xae"))
    with pytest.raises(InputError, match="not text in UTF-8 "):
        load_sources([path])


@pytest.mark.parametrize(
    "field",
    [
        {"model_size": 10**400},
        {"n_threads": -4},
        {"n_gen": 2**80},
        {"avg_ts": 1e308, "samples_ts": [1e308, 1e308]},
        {"samples_ts": [1.0, 1e300]},
    ],
)
def test_numbers_that_no_machine_has(save: Save, field: Test) -> None:
    with pytest.raises(InputError, match="llama-bench did not write it so"):
        load_sources([save([timed(10.0) | field])])
