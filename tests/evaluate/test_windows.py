"""Windows against NumPy over full logits, killed runs, and what the command prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner

from edgekv.backends.base import Backend
from edgekv.backends.open import open_backend
from edgekv.cli.eval import command
from edgekv.errors import BackendError, InputError
from edgekv.evaluate.journal import open_journal
from edgekv.evaluate.model_under_test import (
    ModelUnderTest,
    cache_nbytes_per_token,
    read_tokenizer,
    trained_context,
)
from edgekv.evaluate.reference import open_reference
from edgekv.evaluate.windows import WindowsResult, measure_windows
from edgekv.evaluate.workers import Run, run_units
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.open import open_model
from edgekv.reference.ops import log_softmax
from edgekv.text.scored import cut_windows

WINDOW = 64


def quietly(folder: Path, jobs: int = 1) -> Run:
    return Run(folder, lambda done, total, figures: None, jobs, jobs)


def measure(
    subject: ModelUnderTest,
    reference: ModelUnderTest | None,
    text: Path,
    folder: Path,
    limit: int | None = None,
    window: int = WINDOW,
    jobs: int = 1,
) -> WindowsResult:
    tokenizer = read_tokenizer(subject.path)
    cut = cut_windows(text, tokenizer, window, limit)
    run = quietly(folder, jobs)
    if reference is None:
        return measure_windows(subject, cut, None, run)
    with open_reference(reference, cut, len(tokenizer), folder, fresh=False) as held:
        held.fill(run)
        return measure_windows(subject, cut, held, run)


def by_hand(path: Path, kind: str, text: Path) -> np.ndarray:
    """Log-probabilities of all scored predictions, (windows, scored, vocab)."""
    tokens = read_tokenizer(path).encode(text.read_text())
    backend = open_backend(
        path, kind, n_ctx=WINDOW, cache_type="f32", n_threads=1 if kind == "llama.cpp" else None
    )  # type: ignore[arg-type]
    out = []
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        backend.trim(0)
        logits = backend.prefill_all(tokens[start : start + WINDOW])
        out.append(log_softmax(logits)[WINDOW // 2 : WINDOW - 1])
    backend.close()
    return np.array(out, np.float64)


def test_figures_are_those_of_full_log_probabilities(
    tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path
) -> None:
    p, q = by_hand(tiny_llama, "reference", letters), by_hand(tiny_mla, "llama.cpp", letters)
    tokens = np.array(read_tokenizer(tiny_llama).encode(letters.read_text()))
    windows = tokens[: len(p) * WINDOW].reshape(-1, WINDOW)
    targets = windows[:, WINDOW // 2 + 1 :, None]
    nll = [-np.take_along_axis(x, targets, -1).mean() for x in (p, q)]
    kl = (np.exp(p) * (p - q)).sum(-1)

    found = measure(
        ModelUnderTest(tiny_mla, cache_type="f32"), ModelUnderTest(tiny_llama, "reference"), letters, tmp_path
    )
    assert (found.windows, found.tokens_scored) == (9, 9 * 31)
    assert found.reference_ppl == pytest.approx(np.exp(nll[0]), rel=1e-5)
    assert found.ppl == pytest.approx(np.exp(nll[1]), rel=1e-3)  # the engine rounds by batch
    assert found.ppl_ratio == pytest.approx(np.exp(nll[1] - nll[0]), rel=1e-3)
    assert kl.mean() > 0.01
    assert found.kl == pytest.approx(kl.mean(), rel=2e-3)
    assert found.kl_se == pytest.approx(kl.mean(-1).std(ddof=1) / 3, rel=0.02)
    # two near-equal tokens may change places by the engine's rounding
    assert found.argmax_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2.5 / 279)


def test_a_model_against_itself_loses_nothing(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    found = measure(
        ModelUnderTest(tiny_llama, cache_type="f32"),
        ModelUnderTest(tiny_llama, "reference"),
        letters,
        tmp_path,
    )
    assert found.kl is not None
    assert abs(found.kl) < 5e-5
    assert found.ppl_ratio == pytest.approx(1, abs=2e-3)
    assert found.argmax_agreement == 1


def test_a_coarser_cache_loses_more(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    losses = [
        measure(
            ModelUnderTest(tiny_llama, cache_type=kind),
            ModelUnderTest(tiny_llama, "reference"),
            letters,
            tmp_path,
        ).kl
        for kind in ("f32", "q8_0", "q4_0", "q8_0/q4_0")
    ]
    assert losses[0] < losses[1] / 10 < losses[2] / 100  # type: ignore[operator]
    assert losses[1] < losses[3] < losses[2]  # type: ignore[operator]


def test_dequantized_weights_leave_only_the_caches_loss(smollm2: Path, tmp_path: Path) -> None:
    """As Q4_1 llama.cpp rounds activations to 8 bits, with bf16 weights to 8 bits of mantissa; f16 is like float32."""
    text = tmp_path / "prose.txt"
    text.write_text("The cat sat on the mat, and the dog lay by the door. " * 4)
    reference = ModelUnderTest(smollm2, "reference")
    kl = {}
    for weights in ("keep", "bf16", "f16"):
        subject = ModelUnderTest(smollm2, cache_type="f32", weights=weights)  # type: ignore[arg-type]
        kl[weights] = measure(subject, reference, text, tmp_path / "cache", window=24, limit=1).kl
    assert kl["f16"] < 1e-4 < kl["keep"] < 0.1  # type: ignore[operator]
    assert kl["f16"] < kl["bf16"] < kl["keep"]  # type: ignore[operator]


def test_journals_and_reports_keep_their_word_for_stored_weights(tiny_llama: Path) -> None:
    assert ModelUnderTest(tiny_llama).identity()["weights"] == "stored"
    assert ModelUnderTest(tiny_llama, weights="f16").identity()["weights"] == "f16"


def test_an_interrupted_run_goes_on_and_gives_the_same(
    tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path
) -> None:
    subject, reference = ModelUnderTest(tiny_mla), ModelUnderTest(tiny_llama, "reference")
    whole = measure(subject, reference, letters, tmp_path / "a")
    partial = measure(subject, reference, letters, tmp_path / "b", limit=4)
    assert partial.windows == 4
    for path in (tmp_path / "b").iterdir():  # the last record or line was cut short
        os.truncate(path, path.stat().st_size - 3)
    assert measure(subject, reference, letters, tmp_path / "b") == whole


def test_a_damaged_reference_is_made_again(
    tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path
) -> None:
    subject, reference = ModelUnderTest(tiny_mla), ModelUnderTest(tiny_llama, "reference")
    whole = measure(subject, reference, letters, tmp_path)
    (store,) = tmp_path.glob("reference-*")
    data = bytearray(store.read_bytes())
    data[len(data) // 2] ^= 1
    store.write_bytes(data)
    (journal,) = tmp_path.glob("windows-*")
    journal.unlink()
    assert measure(subject, reference, letters, tmp_path) == whole


def test_what_is_done_is_not_run_again(
    tiny_llama: Path, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(ModelUnderTest(tiny_llama), ModelUnderTest(tiny_llama, "reference"), letters, tmp_path)
    monkeypatch.setattr("edgekv.evaluate.workers.open_engine", None)
    assert (
        measure(ModelUnderTest(tiny_llama), ModelUnderTest(tiny_llama, "reference"), letters, tmp_path)
        == whole
    )


def test_two_runs_of_the_same_do_not_mix(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    identity = {"what": "this"}
    with (
        open_journal(tmp_path, "windows", identity),
        pytest.raises(InputError, match="another process"),
        open_journal(tmp_path, "windows", identity),
    ):
        pass


def test_workers_give_the_same(tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path) -> None:
    subject, reference = ModelUnderTest(tiny_mla, cache_type="f32"), ModelUnderTest(tiny_llama, "reference")
    alone = measure(subject, reference, letters, tmp_path / "a")
    together = measure(subject, reference, letters, tmp_path / "b", jobs=3)
    assert together.windows == alone.windows
    assert together.kl == pytest.approx(alone.kl, rel=1e-3)
    assert together.ppl == pytest.approx(alone.ppl, rel=1e-3)


def test_a_worker_that_dies_is_told_and_what_is_done_stays(tiny_llama: Path, tmp_path: Path) -> None:
    items = [3, 1, 4, -1, 5, 9]
    given = []
    with pytest.raises(BackendError, match="a worker died: killed by SIGKILL"):
        given.extend(
            run_units(ModelUnderTest(tiny_llama, "reference"), 64, quietly(tmp_path, 2), square, items)
        )
    assert given == [9, 1, 16]


def test_a_workers_error_keeps_its_kind(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown cache type 'q9_9'"):
        list(
            run_units(ModelUnderTest(tiny_llama, cache_type="q9_9"), 64, quietly(tmp_path, 2), square, [1, 2])
        )


def square(backend: Backend, item: int) -> int:
    """A unit of work that ends its process on a negative number, when the earlier ones are surely done."""
    if item < 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def test_kill_9_and_again(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    """A long run is killed once its journal has lines; the next one starts from them."""
    long = tmp_path / "long.txt"
    long.write_text(letters.read_text() * 400)
    call = ["eval", str(tiny_llama), "--text", str(long), "--window", "64", "-j", "1",
            "--cache-dir", str(tmp_path / "cache")]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "from edgekv.cli.main import main; main()", *call], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(_lines(tmp_path / "cache")) < 20:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _lines(tmp_path / "cache")
    subject = ModelUnderTest(tiny_llama)
    measure(subject, None, long, tmp_path / "cache", limit=len(before) + 5)
    after = _lines(tmp_path / "cache")
    whole = [line for line in before if line.endswith(b"\n")]
    assert after[: len(whole)] == whole
    assert len(after) == len(before) + 6  # five windows more, and the first line


def _lines(folder: Path) -> list[bytes]:
    return [line for path in folder.glob("windows-*") for line in path.read_bytes().splitlines(keepends=True)]


def test_bytes_a_token_are_the_engines(tiny_llama: Path, tiny_mla: Path) -> None:
    assert cache_nbytes_per_token(ModelUnderTest(tiny_llama), Path()) == 3 * 2 * 2 * 32 * 2
    assert cache_nbytes_per_token(ModelUnderTest(tiny_mla, cache_type="q8_0"), Path()) == 3 * 64 // 32 * 34


def test_the_command(tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path) -> None:
    call = [str(tiny_mla), "--text", str(letters), "--against", str(tiny_llama), "--window", "64",
            "--limit", "3", "-j", "1", "--cache-dir", str(tmp_path)]  # fmt: skip
    found = CliRunner().invoke(command, [*call, "--json"], catch_exceptions=False)
    report = json.loads(found.stdout)
    assert report["format"] == "edgekv.eval"
    assert report["model"]["cache_nbytes_per_token"] == 3 * 64 * 2
    assert report["reference"]["backend"] == "reference"
    assert report["windows"]["tokens_scored"] == 3 * 31
    shown = CliRunner().invoke(command, call, catch_exceptions=False).stdout
    assert "3 windows of 64, 93 tokens scored" in shown
    assert f"{report['windows']['kl']:.6f}" in shown


def test_wrong_input(tiny_llama: Path, smollm2: Path, letters: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    with pytest.raises(InputError, match="600 tokens, less than one window of 1024"):
        cut_windows(letters, tokenizer, 1024, None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 99)
    with pytest.raises(InputError, match="not text in UTF-8"):
        cut_windows(tmp_path / "latin.txt", tokenizer, 8, None)
    with pytest.raises(InputError, match="different vocabularies"):
        CliRunner().invoke(
            command,
            [str(tiny_llama), "--text", str(letters), "--against", str(smollm2), "--window", "64"],
            catch_exceptions=False,
        )
    with pytest.raises(InputError, match="say what to measure"):
        CliRunner().invoke(command, [str(tiny_llama)], catch_exceptions=False)


@pytest.mark.parametrize("cache_type", ["f32", "int8"])
def test_an_onnx_folder_is_measured_like_any_model(
    cache_type: Literal["f32", "int8"], tiny_llama: Path, tiny_mla: Path, letters: Path, tmp_path: Path
) -> None:
    """In float32 it loses what its GGUF loses in llama.cpp; an 8-bit cache shows in bytes and loss."""
    write_onnx(
        open_model(tiny_mla), tmp_path / "onnx", OnnxOptions("f32", cache_type), False, lambda *_: None
    )
    call = [str(tmp_path / "onnx"), "--text", str(letters), "--against", str(tiny_llama), "--window", "64",
            "--limit", "3", "-j", "1", "-t", "1", "--cache-dir", str(tmp_path), "--json"]  # fmt: skip
    report = json.loads(CliRunner().invoke(command, call, catch_exceptions=False).stdout)
    model = report["model"]
    assert (model["backend"], model["cache_type"]) == ("onnx", cache_type)
    assert (model["cache_nbytes_per_token"] < 3 * 64 * 2) == (cache_type == "int8")
    gguf = measure(
        ModelUnderTest(tiny_mla, cache_type="f32"),
        ModelUnderTest(tiny_llama, "reference"),
        letters,
        tmp_path,
        3,
    )
    assert report["windows"]["kl"] == pytest.approx(gguf.kl, rel=1e-2 if cache_type == "f32" else 0.2)
    assert trained_context(tmp_path / "onnx") == trained_context(tiny_llama) == 512
    with pytest.raises(InputError, match="leave out --weights f16"):
        CliRunner().invoke(command, [*call, "--weights", "f16"], catch_exceptions=False)
