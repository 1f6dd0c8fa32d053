"""Calibration text that is all alike: judged on text of other kinds, mixed, said, and named when `verify` fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgekv
from edgekv.backends.reference import ReferenceBackend
from edgekv.errors import ToleranceError
from edgekv.evaluate.verify import compare
from edgekv.models.open import open_model
from edgekv.workflows import convert
from edgekv.workflows.convert import ConvertRequest, ConvertResult

ALIKE = "abcdefghij klmnop. " * 400
Convert = Callable[..., ConvertResult]


@pytest.fixture
def varied() -> str:
    letters = np.random.default_rng(0).choice(list(map(chr, range(32, 127))), 9000)
    return "".join(letters)


@pytest.fixture
def fit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Converts on a text; little is written where it spans too little."""
    monkeypatch.setattr(convert, "LEAST_WRITTEN", 2048)

    def run(text: str, **options: object) -> ConvertResult:
        calib = tmp_path / "calib.txt"
        calib.write_text(text)
        sizes = {"kv_lora_rank": 32, "rope_dim": 32, "text": (calib,), "text_tokens": 2048, "weights": "f32"}
        return edgekv.convert_model(ConvertRequest(tiny_llama, tmp_path / "out.gguf", **{**sizes, **options}))

    return run


def lost(a: Path, b: Path, tokens: np.ndarray) -> float:
    """KL of b to a on tokens that neither text holds."""
    engines = (ReferenceBackend(open_model(path), 256) for path in (a, b))
    return compare(*engines, tokens.tolist(), lambda *_: None).kl


def test_it_is_mixed_with_text_that_the_model_writes(
    fit: Convert, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(4).integers(0, 256, 200)
    found = fit(ALIKE)
    assert len(found.warnings) == 1
    assert "spans too little" in found.warnings[0]
    assert "--text" in found.warnings[0]
    assert found.notes["edgekv.calibration"] == "calib.txt, sampled from the model"
    assert found.notes["edgekv.calibration_tokens"] == 2 * 512 + 2048
    mixed = lost(tiny_llama, found.output, tokens)
    monkeypatch.setattr(convert, "NARROW_LEAST", float("inf"))
    alone = fit(ALIKE, force=True)
    assert alone.warnings == ()
    assert mixed < 0.7 * lost(tiny_llama, alone.output, tokens)


def test_varied_text_is_left_alone(fit: Convert, varied: str) -> None:
    found = fit(varied)
    assert found.warnings == ()
    assert found.notes["edgekv.calibration"] == "calib.txt"
    errors = [loss.elsewhere_error for loss in found.layers]
    assert all(error is not None and 0 < error < 1 for error in errors)
    assert found.notes["edgekv.elsewhere_error"] == pytest.approx(errors, abs=1e-5)


@pytest.mark.parametrize(("least", "cause"), [(float("inf"), "please report"), (0.0, "calibration text")])
def test_what_fails_to_verify_is_not_written_and_the_cause_is_named(
    fit: Convert, varied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, cause: str
) -> None:
    """No engine is as near to the reference as less than nothing."""
    monkeypatch.setattr(convert, "WHOLE_KL", {"f32": -1.0})
    monkeypatch.setattr(convert, "NARROW_LEAST", least)
    monkeypatch.setattr(convert, "NARROW_RATIO", 0.0)
    (tmp_path / "out.gguf").write_bytes(b"an older file")
    with pytest.raises(ToleranceError, match=r"out\.gguf was not written: llama\.cpp differs") as failed:
        fit(varied, verify=True, force=True)
    assert cause in str(failed.value)
    assert (tmp_path / "out.gguf").read_bytes() == b"an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "out.gguf"]
