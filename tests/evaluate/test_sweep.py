"""Sweeps: the spec, which points are dominated, the three files, and what a user gets wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekv.cli.sweep import command
from edgekv.documents import decode
from edgekv.errors import InputError, OutputError
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.plot import KL_FLOOR, sweep_figure
from edgekv.evaluate.reference import open_reference
from edgekv.evaluate.report import Measured
from edgekv.evaluate.sweep import (
    OWN_CACHES,
    SweepPoint,
    SweepReport,
    mark_dominated,
    markdown_table,
    possible_caches,
    read_sweep,
)
from edgekv.evaluate.windows import measure_windows
from edgekv.evaluate.workers import Run
from edgekv.export.gguf.write import write_gguf
from edgekv.progress import ignore
from edgekv.source import LazySource
from edgekv.text.scored import cut_windows
from edgekv.workflows.sweep import write_sweep

SPEC = """
model = "{model}"
text = "letters.txt"
window = 64
cache_types = ["f16", "q8_0", "q8_0/q4_0", "q4_0"]

[[conversion]]
name = "given"
file = "{mla}"
cache_types = ["f16", "q8_0"]

[[conversion]]
name = "made"
convert = "--kv-lora-rank 32 --rope-dim 32 --nope-dim 16 --text letters.txt --text-tokens 256"
cache_types = ["q4_0"]
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def swept(
    tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A folder after a sweep, and what the command printed."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "letters.txt").write_text(letters.read_text())
    (folder / "sweep.toml").write_text(SPEC.format(model=tiny_llama, mla=tiny_mla))
    result = invoke(folder / "sweep.toml", "--limit", 4, "-j", 1, "--cache-dir", folder / "cache", "--json")
    return folder, result


def report_in(folder: Path) -> SweepReport:
    return decode(SweepReport, json.loads((folder / "sweep.json").read_text()))


def test_every_point_is_what_measuring_it_alone_gives(
    swept: tuple[Path, Result], tiny_llama: Path, tiny_mla: Path, tmp_path: Path
) -> None:
    folder, _ = swept
    points = {point.label: point for point in report_in(folder).points}
    assert set(points) == {
        "original f16", "original q8_0", "original q8_0/q4_0", "original q4_0",
        "given f16", "given q8_0", "made q4_0",
    }  # fmt: skip
    assert points["original q4_0"].cache_nbytes_per_token == 3 * 2 * 2 * 18
    assert points["original q8_0/q4_0"].cache_nbytes_per_token == 3 * 2 * (34 + 18)
    assert points["given q8_0"].cache_nbytes_per_token == 3 * 2 * 34
    assert points["made q4_0"].cache_nbytes_per_token == 3 * 2 * 18
    tokenizer = read_tokenizer(tiny_llama)
    text = cut_windows(folder / "letters.txt", tokenizer, 64, 4)
    run = Run(tmp_path, lambda *_: None, 1, 1)
    reference = ModelUnderTest(tiny_llama, cache_type="f32", weights="f32")
    with open_reference(reference, text, len(tokenizer), tmp_path, fresh=False) as held:
        held.fill(run)
        alone = measure_windows(ModelUnderTest(tiny_mla, cache_type="q8_0", weights="f32"), text, held, run)
    assert points["given q8_0"].kl == pytest.approx(alone.kl, rel=1e-6)
    assert points["given q8_0"].ppl == pytest.approx(alone.ppl, rel=1e-6)
    lost = [points[f"original {kind}"].kl for kind in ("f16", "q8_0", "q8_0/q4_0", "q4_0")]
    assert 0 <= lost[0] < lost[1] < lost[2] < lost[3]


def test_what_is_printed_and_written(swept: tuple[Path, Result]) -> None:
    folder, result = swept
    report = report_in(folder)
    assert json.loads(result.stdout) == json.loads((folder / "sweep.json").read_text())
    assert f"wrote {folder / 'sweep.svg'}" in result.stderr
    table = (folder / "sweep.md").read_text()
    assert table == markdown_table(report)
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")][2:]
    sizes = [int(row[3].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(rows) == 7
    assert any("| original | q8_0/q4_0 |" in line for line in table.splitlines())
    picture = (folder / "sweep.svg").read_text()
    for words in ("given", "made", "original", "q8_0/q4_0", "cache bytes per token"):
        assert words in picture


def test_nothing_is_measured_or_converted_twice(
    swept: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = swept
    before = (folder / "sweep.json").read_text(), (folder / "sweep.svg").read_bytes()
    monkeypatch.setattr("edgekv.evaluate.workers.open_engine", None)
    monkeypatch.setattr("edgekv.workflows.sweep.convert_model", None)
    invoke(
        folder / "sweep.toml", "--limit", 4, "--cache-dir", folder / "cache", "--force", "-o",
        folder / "again",
    )  # fmt: skip
    points = [json.loads(text)["points"] for text in (before[0], (folder / "again.json").read_text())]
    assert points[0] == points[1]
    assert (folder / "again.svg").read_bytes() == before[1]


def test_a_changed_calibration_text_is_another_conversion(swept: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = swept
    (tmp_path / "letters.txt").write_text((folder / "letters.txt").read_text()[::-1])
    (tmp_path / "sweep.toml").write_text((folder / "sweep.toml").read_text())
    before = set((folder / "cache").glob("conversion-*"))
    invoke(tmp_path / "sweep.toml", "--limit", 1, "-j", 1, "--cache-dir", folder / "cache")
    assert len(set((folder / "cache").glob("conversion-*")) - before) == 1


def point(name: str, nbytes: float, kl: float) -> SweepPoint:
    return SweepPoint(name, name == "original", "f16", nbytes, kl, 0.0, 1.0, 1.0, 0.0, 1.0)


def test_dominated_points() -> None:
    marked = mark_dominated(
        [
            point("a", 100, 0.5),
            point("b", 100, 0.4),
            point("c", 50, 0.4),
            point("d", 10, 0.9),
            point("e", 10, 0.9),
            point("f", 200, 0.1),
            point("g", 300, 0.1),
        ]
    )
    assert [p.name for p in marked] == ["g", "f", "b", "a", "c", "d", "e"]
    assert {p.name: p.dominated_by for p in marked} == {
        "a": "b f16", "b": "c f16", "c": None, "d": None, "e": None, "f": None, "g": "f f16",
    }  # fmt: skip


def test_domination_on_random_points_is_the_definition() -> None:
    rng = np.random.default_rng(2)
    points = [point(f"p{i}", *rng.integers(1, 12, 2)) for i in range(60)]
    for p in mark_dominated(points):
        beaten = any(
            (o.cache_nbytes_per_token <= p.cache_nbytes_per_token and o.kl < p.kl)
            or (o.cache_nbytes_per_token < p.cache_nbytes_per_token and o.kl <= p.kl)
            for o in points
        )
        assert (p.dominated_by is not None) == beaten


def small_report(points: tuple[SweepPoint, ...]) -> SweepReport:
    model = Measured("m.gguf", "0" * 64, "llama.cpp", "1", "f32", "f32", 400.0, None)
    return SweepReport(
        "edgekv.sweep", 1, "1", "edgekv", "t", "0" * 64, 64, 1, 31, model, 9.0, mark_dominated(points)
    )


def test_dominated_points_are_hollow_and_axes_logarithmic() -> None:
    """A KL of nothing stands on the floor of the picture."""
    points = (
        point("original", 100, 0.0),
        point("original", 10, 0.1),
        point("x", 50, 0.5),
        point("y", 5, 0.5),
    )
    (axes,) = sweep_figure(small_report(points)).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = {}
    for dots in axes.collections:
        for x, y in dots.get_offsets():
            drawn[x, y] = len(dots.get_facecolor()) > 0
    assert drawn == {(100, KL_FLOOR): True, (10, 0.1): True, (50, 0.5): False, (5, 0.5): True}
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-"] == [[100, 10]]


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    said: list[str] = []
    report = small_report((point("original", 100, 0.2),))
    write_sweep(report, tmp_path / "s", False, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.md"]
    assert decode(SweepReport, json.loads((tmp_path / "s.json").read_text())) == report
    assert "pip install 'edgekv[plot]'" in said[-1]


def test_names_with_bars_keep_the_table_whole() -> None:
    row = markdown_table(small_report((replace(point("a|b", 10, 0.1)),))).splitlines()[4]
    assert row.startswith("| a\\|b | f16 |")


GOOD = 'model = "m"\ntext = "t"\n'
ENTRY = '[[conversion]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model = ", "Invalid value"),
        ("model = " + "[" * 5000, "recursion|nest"),
        ('text = "t"', "model: missing"),
        (GOOD + "windows = 5", "windows: unknown key"),
        (GOOD + "window = 3", "window: 3 tokens have no half"),
        (GOOD + 'weights = "q8_0"', "weights: 'q8_0' is not one of"),
        (GOOD + 'cache_types = ["q9"]', r"cache_types\[0\]: unknown cache type 'q9'; known: f32"),
        (GOOD + 'cache_types = ["f16", "f16"]', r"cache_types\[1\]: f16 is there twice"),
        (GOOD + 'cache_types = ["q8_0/q9"]', r"cache_types\[0\]: unknown cache type 'q9'"),
        (GOOD + 'cache_types = ["f16/f16", "f16"]', r"cache_types\[1\]: f16 is there twice"),
        (GOOD + ENTRY, r"conversion\[0\].cache_types: missing"),
        (GOOD + ENTRY + "cache_types = []\nfile = 'x'", r"conversion\[0\].cache_types: at least one"),
        (GOOD + ENTRY + 'cache_types = ["f16"]', r"conversion\[0\]: give either file"),
        (GOOD + ENTRY + 'cache_types = ["f16"]\nfile = "x"\nconvert = "y"', "give either file"),
        (
            GOOD + ENTRY.replace("a", "original", 1) + 'cache_types = ["f16"]\nfile = "x"',
            "unknown key|is taken",
        ),
        (GOOD + (ENTRY + 'cache_types = ["f16"]\nfile = "x"\n') * 2, r"conversion\[1\].name: 'a' is taken"),
    ],
)
def test_what_is_wrong_in_a_spec_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(InputError, match=problem) as caught:
        read_sweep(tmp_path / "s.toml")
    assert "\n" not in str(caught.value)


def test_the_originals_own_caches_are_those_it_can_have(
    tiny_llama: Path, tiny_mla: Path, make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    assert possible_caches(tiny_llama) == OWN_CACHES
    assert possible_caches(tiny_mla) == ("f16", "q8_0", "q5_0", "q4_0")
    write_gguf(make_llama(head_dim=48), tmp_path / "odd.gguf", "f32", {}, False, ignore)
    assert possible_caches(tmp_path / "odd.gguf") == ("f16",)


def test_what_a_sweep_refuses_before_it_measures(
    tiny_llama: Path, smollm2: Path, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.evaluate.workers.open_engine", None)
    spec = tmp_path / "s.toml"
    head = f'model = "{tiny_llama}"\ntext = "{letters}"\nwindow = 64\n{ENTRY}cache_types = ["f16"]\n'

    def sweep(rest: str) -> None:
        spec.write_text(head + rest)
        invoke(spec, "--cache-dir", tmp_path / "cache")

    with pytest.raises(InputError, match="different vocabularies"):
        sweep(f'file = "{smollm2}"')
    with pytest.raises(InputError, match=r"a: convert = '--targe 0\.5': No such option"):
        sweep('convert = "--targe 0.5"')
    with pytest.raises(InputError, match="No closing quotation"):
        sweep("""convert = "--text 'x" """)
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/none.txt"):
        sweep('convert = "--target 0.5 --text none.txt"')
    with pytest.raises(InputError, match=r"missing\.gguf: there is no such file"):
        sweep('file = "missing.gguf"')
    with pytest.raises(InputError, match=r"cannot read .*none\.toml"):
        invoke(tmp_path / "none.toml")
    (tmp_path / "s.md").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        sweep('convert = "--target 0.5"')
    assert (tmp_path / "s.md").read_text() == "mine"
