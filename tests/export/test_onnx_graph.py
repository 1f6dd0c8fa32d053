"""The graph writer, its graphs run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgekv.export.onnx.graph import ALIGNMENT, INLINE_NBYTES, GraphWriter, Value
from edgekv.export.onnx.weights import Bits, linear, quantize_blocks
from edgekv.models.onnx.external_data import external_tensors

DATA = "weights"


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "graph"), options)


def stored(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "graph", load_external_data=False).graph


def test_a_graph_computes_what_was_written(tmp_path: Path) -> None:
    large, small = random(8, 64), random(64)
    with (tmp_path / DATA).open("wb") as data:
        g = GraphWriter(data, DATA)
        x = g.input("x", np.float32, (1, "n", 64))
        factor = g.optional_input("factor", np.array([2], np.int64))
        scaled = g.op("Mul", x, g.cast(factor, np.float32))
        left, right = g.ops(
            "Split", g.op("Mul", scaled, g.weight("small", small)), n_outputs=2, axis=-1, num_outputs=2
        )
        g.output(g.op("Add", left, right), "sum", np.float32, (1, "n", 32))
        product = g.op("MatMul", scaled, g.weight("large", large.T))
        g.output(product, "product", np.float32, (1, "n", 8), first=True)
    g.save(tmp_path / "graph", {"note": "kept"})
    engine, x = session(tmp_path), random(1, 5, 64)
    assert [(i.name, i.shape) for i in engine.get_inputs()] == [("x", [1, "n", 64])]
    assert [o.name for o in engine.get_outputs()] == ["product", "sum"]
    assert engine.get_modelmeta().custom_metadata_map == {"note": "kept"}
    for given, gain in (({}, 2), ({"factor": np.array([3])}, 3)):
        product, total = engine.run(None, {"x": x} | given)
        np.testing.assert_allclose(product, gain * x @ large.T, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(
            total, gain * (x * small).reshape(1, 5, 2, 32).sum(2), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("taken", [True, False])
def test_one_of_two_branches_runs(taken: bool, tmp_path: Path) -> None:
    """Both read a value and a constant of the graph around them, and one of them has an operator of onnxruntime's."""
    with (tmp_path / DATA).open("wb") as data:
        g = GraphWriter(data, DATA)
        condition, x = g.input("condition", np.bool_, ()), g.input("x", np.float32, (1, 32))
        doubled = g.op("Mul", x, g.scalar(2.0))

        def then() -> Value:
            return linear(g, g.op("Mul", doubled, g.scalar(2.0)), "inner", np.eye(32, dtype=np.float32), 8)

        either = g.either(condition, then, lambda: g.op("Neg", g.op("Mul", doubled, g.scalar(5.0))))
        again = g.either(condition, lambda: g.op("Abs", either), lambda: g.op("Neg", either))
        g.output(g.op("Add", again, g.scalar(2.0)), "y", np.float32, (1, 32))
    g.save(tmp_path / "graph", {})
    assert g.contrib_kinds() == ("MatMulNBits",)
    x = np.round(random(1, 32) * 100) / 100
    (y,) = session(tmp_path).run(None, {"condition": np.array(taken), "x": x})
    np.testing.assert_allclose(y, 2 + (np.abs(4 * x) if taken else 10 * x), atol=0.1 if taken else 1e-5)
    assert len([t for t in stored(tmp_path).initializer if t.name.startswith("constant")]) == 2, "2.0 and 5.0"


def test_where_weights_lie(tmp_path: Path) -> None:
    arrays = {"a": random(100, 7), "b": random(33, 50), "edge": random(INLINE_NBYTES // 4)}
    with (tmp_path / DATA).open("wb") as data:
        g = GraphWriter(data, DATA)
        weights = {name: g.weight(name, array) for name, array in arrays.items()}
        small = g.weight("small", random(INLINE_NBYTES // 4 - 1))
        twins = {
            "flat": g.same_weight("flat", weights["b"], (1650,)),
            "wide": g.same_weight("wide", small, (5, 51)),
        }
        for name, value in (weights | twins | {"small": small}).items():
            g.output(g.op("Identity", value), f"{name}_out", np.float32, value.shape.numpy())
    size = (tmp_path / DATA).stat().st_size
    g.save(tmp_path / "graph", {})
    assert (tmp_path / DATA).stat().st_size == size < sum(a.nbytes for a in arrays.values()) + 3 * ALIGNMENT
    outside = list(external_tensors((tmp_path / "graph").read_bytes(), tmp_path / "graph"))
    assert [t.nbytes for t in outside] == [2800, 6600, INLINE_NBYTES, 6600]
    assert all(t.offset % ALIGNMENT == 0 and t.location == DATA for t in outside)
    assert outside[1] == outside[3], "stored once"
    engine = session(tmp_path)
    found = dict(zip((o.name for o in engine.get_outputs()), engine.run(None, {}), strict=True))
    for name, array in arrays.items():
        assert np.array_equal(found[f"{name}_out"], array)
    assert np.array_equal(found["flat_out"], arrays["b"].reshape(-1))
    assert np.array_equal(found["wide_out"].reshape(-1), found["small_out"])


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("n_cols", [64, 80])
def test_a_linear_layer_multiplies_by_its_rounded_matrix(bits: Bits, n_cols: int, tmp_path: Path) -> None:
    matrix, x = random(24, n_cols), random(1, 3, n_cols)
    with (tmp_path / DATA).open("wb") as data:
        g = GraphWriter(data, DATA)
        y = linear(g, g.input("x", np.float32, (1, 3, n_cols)), "matrix", matrix, bits)
        g.output(y, "y", np.float32, (1, 3, 24))
    g.save(tmp_path / "graph", {})
    if bits != 32:
        blocks = quantize_blocks(matrix, bits)
        codes = blocks.packed if bits == 8 else np.stack([blocks.packed & 15, blocks.packed >> 4], -1)
        codes = codes.reshape(24, -1, 32).astype(np.float32) - (1 << (bits - 1))
        matrix = (codes * blocks.scales[..., None]).reshape(24, -1)[:, :n_cols]
    (y,) = session(tmp_path).run(None, {"x": x})
    # With 8-bit activations each of the n_cols products is off by at most a two-hundredth of the largest.
    np.testing.assert_allclose(y, x @ matrix.T, atol=1e-4 if bits == 32 else 0.02 * n_cols**0.5)
