"""Attention as ONNX nodes against the NumPy reference: one layer at a time, random shapes and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgekv.cache.store import KVCache
from edgekv.export.onnx.attention import GroupedAttention, GroupedInputs
from edgekv.export.onnx.graph import GraphWriter
from edgekv.export.onnx.latent import LatentAttention, LatentInputs
from edgekv.reference.attention import gqa_attention, mla_attention
from edgekv.reference.model import BlockWeights
from edgekv.source import Array
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec, Yarn
from edgekv.tensors import layer_tensor_shapes

EPS = 1e-5
N_CTX = 64
WINDOW = 9


def random_rope(rng: np.random.Generator) -> RopeSpec:
    dim = 2 * int(rng.integers(1, 17))
    return RopeSpec(
        float(rng.choice([1e4, 5e5])),
        dim,
        str(rng.choice(["half", "interleaved"])),  # type: ignore[arg-type]
        yarn=Yarn(4.0, 32) if rng.integers(2) else None,
        magnitude=float(rng.choice([1.0, 1.2])),
    )


def random_mla(rng: np.random.Generator) -> MLA:
    rank = int(rng.integers(1, 60))
    value_dim = rank + int(rng.integers(-rank + 1, 20))  # on both sides of the rank, which makes two graphs
    n_heads, nope_dim, q_rank = (int(n) for n in rng.integers([1, 1, 0], [7, 40, 30]))
    return MLA(n_heads, rank, nope_dim, value_dim, random_rope(rng), q_rank, float(rng.choice([0.0, 0.2])))


class Layer:
    """One attention layer with random weights, as a graph in onnxruntime and in NumPy."""

    def __init__(self, folder: Path, attention: GQA | MLA | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.attention = attention or random_mla(rng)
        self.dim, self.n_slots, self.n_past = int(rng.integers(4, 80)), N_CTX, 0
        self.weights: BlockWeights = {
            name: (rng.standard_normal(shape) / shape[-1] ** 0.5 + ("norm" in name)).astype(np.float32)
            for name, shape in layer_tensor_shapes(self.attention, self.dim, 1).items()
            if name.startswith("attn") and name != "attn_norm.weight"
        }
        spec = ModelSpec("test", "test", (LayerSpec(self.attention, 1),), self.dim, 1, N_CTX, EPS, True)
        self.reference = KVCache(spec, N_CTX)
        with (folder / "data").open("wb") as data:
            g = GraphWriter(data, "data")
            x = g.input("x", np.float32, (1, "sequence_length", self.dim))
            mask = g.input("attention_mask", np.int64, (1, "total_length"))
            positions = g.input("position_ids", np.int64, (1, "sequence_length"))
            slots = g.op("Reshape", positions, g.ints(-1))
            if isinstance(self.attention, GQA):
                nodes = GroupedAttention(g, self.attention, EPS, GroupedInputs(g, positions, slots, N_CTX))
            else:
                nodes = LatentAttention(
                    g, self.attention, EPS, LatentInputs(g, mask, positions, slots, N_CTX)
                )
            y = nodes.add(x, dict(self.weights), 0, 32)
            g.output(y, "y", np.float32, (1, "sequence_length", self.dim), first=True)
        g.save(folder / "graph", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.engine = onnxruntime.InferenceSession(str(folder / "graph"), options)
        self.past = {
            i.name: self._garbage(i.shape, rng) for i in self.engine.get_inputs() if "past" in i.name
        }

    def _garbage(self, shape: list[int | str], rng: np.random.Generator) -> np.ndarray:
        """What slots hold that nothing has been written to: it must not be read."""
        slots = {"cache_length": N_CTX, f"slots_of_window_{WINDOW}": WINDOW + 3}
        sizes = [slots[n] if isinstance(n, str) else n for n in shape]
        return rng.uniform(50, 99, sizes).astype(np.float32)

    def run(self, x: Array) -> tuple[Array, Array]:
        """Outputs (T, D) for the next tokens, (T, D): onnxruntime's and the reference's. Both caches advance."""
        start, stop = self.n_past, self.n_past + len(x)
        total = stop if isinstance(self.attention, GQA) else N_CTX  # as the backend fills them
        feed = {"x": x[None], "position_ids": np.arange(start, stop)[None]}
        feed["attention_mask"] = (np.arange(total) < stop)[None].astype(np.int64)
        names = [output.name for output in self.engine.get_outputs()]
        outputs = dict(zip(names, self.engine.run(None, feed | self.past), strict=True))
        self.past = {name: outputs[name.replace("past_key_values", "present")] for name in self.past}
        if isinstance(self.attention, GQA):
            expected = gqa_attention(x, self.weights, self.attention, self.reference, 0, EPS)
        else:
            expected = mla_attention(x, self.weights, self.attention, EPS, self.reference, 0, "naive")
        self.reference.advance(len(x))
        self.n_past = stop
        return outputs["y"][0], expected

    def tokens(self, n: int) -> Array:
        return np.random.default_rng(n).standard_normal((n, self.dim)).astype(np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_latent_attention(seed: int, tmp_path: Path) -> None:
    layer = Layer(tmp_path, None, seed)
    for n_tokens in (7, 1, 1, 30, 1):
        found, expected = layer.run(layer.tokens(n_tokens))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "traits",
    [
        {"bias": True},
        {"qk_norm": True},
        {"qk_norm": True, "bias": True, "rope": RopeSpec(1e4, 32, "half")},
        {"window": WINDOW},
        {"window": WINDOW, "softcap": 2.0, "scale": 0.3, "rope": RopeSpec(5e5, 32, yarn=Yarn(4.0, 32))},
        {"window": N_CTX},
        {"rope": RopeSpec(1e4, 0)},
        {"rope": RopeSpec(1e4, 16, "half"), "qk_norm": True, "window": WINDOW},
        {"rope": RopeSpec(1e4, 16)},
    ],
    ids=str,
)
def test_grouped_attention(traits: dict[str, Any], tmp_path: Path) -> None:
    """A window's cache holds 12 tokens: it moves rows both within a step and between steps."""
    layer = Layer(tmp_path, GQA(4, 2, 32, **({"rope": RopeSpec(1e4, 32)} | traits)), 0)
    for n_tokens in (7, 1, 1, 30, 1, 1, 1, 1, 5):
        found, expected = layer.run(layer.tokens(n_tokens))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
