"""Work and bytes per token, counted by hand, and the same wherever they are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from edgekv.devices.predict.choices import option
from edgekv.devices.predict.model_info import describe_model
from edgekv.export.gguf.write import write_gguf
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant.formats import KEEP
from edgekv.source import LazySource
from edgekv.tensors import looked_up, model_tensor_shapes, read_nbytes, weight_flops


@pytest.mark.parametrize("tied", [True, False])
def test_work_of_a_small_llama(tied: bool, make_llama: Callable[..., LazySource]) -> None:
    spec = make_llama(tied=tied).spec
    shapes = model_tensor_shapes(spec)
    block = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96  # queries and output, keys and values, the feed-forward
    assert weight_flops(spec, shapes) == 2 * (3 * block + spec.vocab * 64), (
        "the table counts once: as the head"
    )
    sizes = {name: 4 * prod(shape) for name, shape in shapes.items()}
    norms = (2 * 3 + 1) * 64
    assert read_nbytes(spec, sizes) == 4 * (3 * block + spec.vocab * 64 + norms)
    assert looked_up(spec) == (set() if tied else {"token_embd.weight"})
    assert weight_flops(replace(spec, tied_embeddings=True), shapes) >= weight_flops(spec, shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_reports_plans_and_exports_agree(
    tied: bool, make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(make_llama(tied=tied), path, "f32", {}, False, lambda *_: None)
    source = GGUFSource(path)
    described, planned = describe_model(source, path, with_hash=False), option(source, None, "f16", KEEP)
    exported = write_onnx(source, tmp_path / "onnx", OnnxOptions(), False, lambda *_: None).model
    assert described.flops == planned.workload().weight_flops == exported.flops
    assert described.read_nbytes == planned.read_nbytes
    table = 4 * prod(source.shape("token_embd.weight"))
    turns = 4 * source.spec.context_length * source.spec.layers[0].attention.rope.dim
    assert exported.weights_nbytes - exported.read_nbytes == turns + (0 if tied else table)
