"""A GQA export in onnxruntime-genai, the ecosystem's own program for language models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.backends.onnxruntime import OnnxBackend
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.source import LazySource


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None,
    reason="PyPI has no onnxruntime-genai wheel for this platform",
)
@pytest.mark.parametrize("window", [0, 9])
def test_it_says_what_our_backend_says(
    window: int, make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    """The middle layer may have a window: onnxruntime-genai gives it a cache as long as the others'."""
    import onnxruntime_genai as genai

    folder, prompt = tmp_path / "out", [5, 70, 33, 120]
    source = make_llama()
    plain = source.spec.layers[0]
    local = replace(plain, attention=replace(plain.attention, window=window))
    source.spec = replace(source.spec, layers=(plain, local, plain))
    write_onnx(source, folder, OnnxOptions("f32"), False, lambda done, total: None)
    ours, engine = [], OnnxBackend(folder, n_ctx=64, n_threads=1)
    logits = engine.prefill(prompt)
    for _ in range(20):
        ours.append(int(logits.argmax()))
        logits = engine.decode(ours[-1])
    engine.close()

    config = genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    model = genai.Model(config)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(prompt)
    theirs: list[int] = []
    while not generator.is_done() and len(theirs) < 20:
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert len(theirs) > 4
    assert theirs == ours[: len(theirs)]
