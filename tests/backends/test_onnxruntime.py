"""The onnxruntime backend: its cache, its limits, and folders that are not what they say."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgekv.backends.base import Interrupted
from edgekv.backends.onnxruntime import SLOT_STEP, OnnxBackend, _slots
from edgekv.backends.open import open_backend
from edgekv.errors import BackendError, InputError, ModelFileError
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.onnx.folder import DATA, GRAPH, MANIFEST
from edgekv.models.onnx.manifest import WINDOW_SLACK, check_folder
from edgekv.models.open import open_model
from edgekv.progress import ignore
from edgekv.source import LazySource

Close = Callable[[np.ndarray, np.ndarray], bool]
WINDOW = 36
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 250, 300)]


@pytest.fixture(scope="module", params=["gqa", "windows", "mla", "mla-int8"])
def folder(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tiny_mla: Path,
    make_llama: Callable[..., LazySource],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A GQA export, one of which two layers have windows, one with latents, and one with latents in 8 bits."""
    path = tmp_path_factory.mktemp("onnx") / request.param
    options = OnnxOptions("f32", "int8" if request.param == "mla-int8" else "f32")
    if request.param == "windows":
        write_onnx(with_windows(make_llama()), path, options, False, ignore)
        return path
    model = tiny_llama if request.param == "gqa" else tiny_mla
    write_onnx(open_model(model), path, options, False, ignore)
    return path


def with_windows(source: LazySource) -> LazySource:
    """The same model, where the first and the last layer see WINDOW tokens."""
    plain = source.spec.layers[0]
    local = replace(plain, attention=replace(plain.attention, window=WINDOW))
    source.spec = replace(source.spec, layers=(local, plain, local))
    return source


@pytest.fixture
def engine(folder: Path) -> Iterator[OnnxBackend]:
    backend = OnnxBackend(folder, n_ctx=300, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture
def close(folder: Path) -> Close:
    """Whether logits are equal, but for the order of additions; in 8 bits that may turn a code up or down."""
    tolerance = 0.1 if folder.name == "mla-int8" else 2e-4
    return lambda a, b: bool(np.abs(a - b).max() < tolerance)


def test_prefill_and_decode_agree(engine: OnnxBackend, close: Close) -> None:
    whole = engine.prefill_all(TOKENS)
    assert whole.shape == (300, engine.n_vocab)
    engine.trim(0)
    assert close(engine.prefill(TOKENS[:150]), whole[149])
    for i in range(150, 290):  # crosses the step at which more slots are bound
        assert close(engine.decode(TOKENS[i]), whole[i])
    assert 2 * SLOT_STEP < 290
    assert engine.n_past == 290


def test_what_was_trimmed_is_forgotten(engine: OnnxBackend, close: Close) -> None:
    expected = engine.prefill_all(TOKENS[:40])[-1]
    engine.trim(0)
    engine.prefill(TOKENS[100:290])
    engine.trim(0)
    engine.prefill(TOKENS[:30] + TOKENS[200:220])
    engine.trim(30)
    assert engine.n_past == 30
    assert close(engine.prefill(TOKENS[30:40]), expected)


def test_a_full_cache_is_refused_and_left_as_it_was(engine: OnnxBackend, close: Close) -> None:
    engine.prefill(TOKENS[:299])
    with pytest.raises(BackendError, match="larger context"):
        engine.prefill([1, 2])
    last = engine.decode(TOKENS[299])
    assert engine.n_past == engine.n_ctx == 300
    with pytest.raises(BackendError, match="larger context"):
        engine.decode(1)
    engine.trim(299)
    assert close(engine.decode(TOKENS[299]), last)


def test_the_abort_flag_ends_a_prefill(folder: Path) -> None:
    flag = ctypes.create_string_buffer(2)
    engine = OnnxBackend(folder, n_ctx=300, n_threads=1, abort_flag=flag)
    flag[0] = b"\1"
    with pytest.raises(Interrupted):
        engine.prefill(TOKENS[:10])
    assert engine.n_past == 0
    engine.prefill(TOKENS[:10])
    engine.close()


def test_cache_bytes_are_the_manifests(folder: Path, engine: OnnxBackend) -> None:
    about = check_folder(folder).model
    let_go = 300 - WINDOW - WINDOW_SLACK if folder.name == "windows" else 0  # tokens, in two of three layers
    assert engine.cache_nbytes() == (300 - let_go * 2 / 3) * about.cache_nbytes
    assert sum(array.nbytes for array in engine._cache.values()) == engine.cache_nbytes()


@pytest.mark.parametrize("folder", ["windows"], indirect=True)
def test_windows_that_were_let_go_empty_the_cache(engine: OnnxBackend, close: Close) -> None:
    """Trimming is exact as long as no rows have moved since; else nothing is left and the caller starts anew."""
    whole = engine.prefill_all(TOKENS)
    moves = WINDOW + WINDOW_SLACK
    for n_tokens, back_to, left in ((moves, 1, 1), (moves + 9, moves + 1, moves + 1), (moves + 9, moves, 0)):
        engine.trim(0)
        engine.prefill(TOKENS[:n_tokens])
        engine.trim(back_to)
        assert engine.n_past == left
        following = engine.prefill_all(TOKENS[left:290])
        assert close(following, whole[left:290])


@pytest.mark.parametrize("folder", ["windows"], indirect=True)
@pytest.mark.parametrize("n_ctx", [WINDOW - 1, WINDOW, WINDOW + 9])
def test_contexts_about_as_long_as_a_window(
    folder: Path, engine: OnnxBackend, close: Close, n_ctx: int
) -> None:
    small = OnnxBackend(folder, n_ctx=n_ctx, n_threads=1)
    assert small.cache_nbytes() == n_ctx * check_folder(folder).model.cache_nbytes
    assert close(small.prefill_all(TOKENS[:n_ctx]), engine.prefill_all(TOKENS[:n_ctx]))
    small.close()


def test_a_cache_takes_memory_as_rows_are_written() -> None:
    slots = _slots((1, 16, 8192, 64), np.float32, small_pages=True)  # 2 MiB per head, as large as a huge page
    assert not slots.any(), "which reads all of it"
    before = _anonymous_nbytes()
    slots[:, :, :4] = 1.0
    assert 16 * 1024 <= _anonymous_nbytes() - before < 4 * 2**20, "of 32 MiB"


def test_a_prompt_leaves_no_second_token_table(folder: Path) -> None:
    engine = OnnxBackend(folder, n_ctx=300, n_threads=1)
    engine.prefill(TOKENS)
    maps = Path("/proc/self/smaps").read_text().split(f"{folder.resolve() / DATA}\n")[1:]
    assert maps, "the weights are mapped"
    assert sum(int(part.split("Rss:")[1].split()[0]) for part in maps) == 0
    engine.close()


def _anonymous_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_folder_opens_on_its_own(folder: Path, tiny_llama: Path) -> None:
    opened = open_backend(folder, n_ctx=64, n_threads=1)
    assert opened.name == "onnx"
    opened.close()
    with pytest.raises(InputError, match="leave out"):
        open_backend(folder, "llama.cpp")
    with pytest.raises(InputError, match="leave out"):
        open_backend(folder, cache_type="q8_0")
    with pytest.raises(InputError, match="edgekv export onnx"):
        open_backend(tiny_llama, "onnx")
    with pytest.raises(InputError, match="at least 1"):
        open_backend(folder, n_threads=0)


def test_an_engine_that_is_too_old_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(BackendError, match="too old"):
        OnnxBackend(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of a folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def put(path: Path, content: bytes) -> None:
    """Write a file and make the manifest agree, as somebody who tampers would."""
    path.write_bytes(content)
    manifest = path.parent / MANIFEST
    listed = json.loads(manifest.read_text())
    listed["files"][path.name]["nbytes"] = len(content)
    manifest.write_text(json.dumps(listed))


def test_a_cut_data_file_is_refused_before_the_engine_starts(copied: Path) -> None:
    data = copied / DATA
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data: has \d+ bytes"):
        OnnxBackend(copied)
    put(data, data.read_bytes())  # the manifest agrees, the graph still promises more
    with pytest.raises(ModelFileError, match="cut short"):
        OnnxBackend(copied)
    data.unlink()
    with pytest.raises(ModelFileError, match="missing"):
        OnnxBackend(copied)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "other.data", ""])
def test_weights_outside_of_the_folder_are_refused(copied: Path, location: str) -> None:
    (copied.parent / "secret").write_bytes(b"x" * 2**20)
    model = onnx.load(copied / GRAPH, load_external_data=False)
    outside = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in outside.external_data if entry.key == "location").value = location
    put(copied / GRAPH, model.SerializeToString())
    with pytest.raises(ModelFileError, match="do not use"):
        OnnxBackend(copied)


def test_a_tensor_hidden_in_a_node_is_found(copied: Path) -> None:
    model = onnx.load(copied / GRAPH, load_external_data=False)
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    put(copied / GRAPH, model.SerializeToString())
    with pytest.raises(ModelFileError, match="/etc/passwd"):
        check_folder(copied)


def test_a_data_file_that_is_a_link_outwards_is_refused(copied: Path) -> None:
    outside = copied.parent / "outside"
    (copied / DATA).rename(outside)
    (copied / DATA).symlink_to(outside)
    with pytest.raises(ModelFileError, match="own folder"):
        OnnxBackend(copied)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:100], "damaged"),
        (lambda text: "[" * 100000, "damaged"),
        (lambda text: text.replace('"version": 2', '"version": 9'), "upgrade"),
        (lambda text: text.replace('"n_layers": 3', '"n_layers": 4'), "damaged"),
        (lambda text: text.replace('"window": 0', '"window": -1'), "damaged"),
        (lambda text: text.replace('"window": 0', '"window": 999999999999'), "damaged"),
        (lambda text: text.replace('"vocab.gguf"', '"../vocab.gguf"'), "does not list"),
        (lambda text: text.replace('"generation_config.json"', '"../generation.json"'), "file name"),
    ],
)
def test_damaged_manifests(copied: Path, damage: object, says: str) -> None:
    manifest = copied / MANIFEST
    manifest.write_text(damage(manifest.read_text()))  # type: ignore[operator]
    with pytest.raises(ModelFileError, match=says):
        check_folder(copied)


def test_no_damage_of_the_graph_escapes_as_another_error(copied: Path) -> None:
    """Whatever bytes change, the folder is refused or sound: the reader never raises anything else."""
    content = (copied / GRAPH).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(content)
        for at in rng.integers(0, len(broken), 8):
            broken[at] = int(rng.integers(256))
        put(copied / GRAPH, bytes(broken[: int(rng.integers(1, len(broken)))]))
        with contextlib.suppress(ModelFileError):
            check_folder(copied)
