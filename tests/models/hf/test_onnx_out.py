"""Hugging Face folders as ONNX: onnxruntime against the reference and transformers, family by family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.onnxruntime import OnnxBackend
from edgekv.errors import UnsupportedError
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.hf.source import HFSource
from edgekv.progress import ignore
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import kl_rows, log_softmax

from .conftest import MODELS, N_VOCAB, TOKENS, Zoo

REFUSED = {
    **dict.fromkeys(("deepseek2-lite", "deepseek2-grouped", "deepseek3"), "experts"),
    **dict.fromkeys(("kimi-k2", "kimi-k2-ramp", "glm-lite"), "experts"),
}


def export(zoo: Zoo, name: str, folder: Path) -> Path:
    write_onnx(HFSource(zoo.folder(name)), folder, OnnxOptions("f32"), False, ignore)
    return folder


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_onnxruntime_gives_transformers_distribution(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """At once, and token by token; the reference's and transformers' logits."""
    engine = OnnxBackend(export(zoo, name, tmp_path / "out"), n_ctx=len(TOKENS), n_threads=1)
    try:
        at_once = engine.prefill_all(TOKENS.tolist())
        engine.trim(0)
        one_by_one = np.stack([engine.decode(token) for token in TOKENS.tolist()])
    finally:
        engine.close()
    model = ReferenceModel(HFSource(zoo.folder(name)))
    reference = model.logits(model.hidden(TOKENS, model.new_cache(len(TOKENS))))
    for given in (at_once, one_by_one):
        for wanted in (reference, zoo.logits(name)):
            assert abs(kl_rows(log_softmax(wanted), log_softmax(given)).mean()) <= 1e-6
            assert np.abs(given - wanted).max() <= 2e-4


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "qwen3-window", "phi", "gemma2", "gemma3"])
def test_windows_that_let_go(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """The reference keeps every token; windows here hold 20 or 24 of 240."""
    tokens = np.random.default_rng(4).integers(0, N_VOCAB, 240)
    source = HFSource(zoo.folder(name))
    engine = OnnxBackend(export(zoo, name, tmp_path / "out"), n_ctx=240, n_threads=1)
    assert engine.cache_nbytes() < 0.9 * 240 * source.spec.kv_bytes_per_token("f32")
    at_once = engine.prefill_all(tokens[:200].tolist())
    given = np.concatenate([at_once, [engine.decode(token) for token in tokens[200:].tolist()]])
    engine.close()
    model = ReferenceModel(source)
    wanted = model.logits(model.hidden(tokens, model.new_cache(240)))
    assert abs(kl_rows(log_softmax(wanted), log_softmax(given)).mean()) <= 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_know_is_refused(name: str, zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        export(zoo, name, tmp_path / "out")
    assert not list(tmp_path.iterdir())
