"""Rows moved to other positions against rows that an engine computes there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.open import model_identity, open_backend
from edgekv.cache.rows import CacheRows, Plane
from edgekv.chat.rotation import MOVABLE, moved, turned
from edgekv.errors import UnsupportedError
from edgekv.models.identity import ModelIdentity
from edgekv.reference.ops import apply_rope
from edgekv.spec import RopeSpec

DISTANCES = (1, 2, 3, 17, 64, 1000, 4096, 7000)
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 250, 24)]


@pytest.mark.parametrize("cache_type", MOVABLE)
def test_moved_rows_are_those_that_llama_cpp_computes_there(tiny_mla: Path, cache_type: str) -> None:
    """Rows of the first layer: they depend on a token and its position alone. llama.cpp takes angles in float32."""
    engine = open_backend(tiny_mla, n_ctx=7168, cache_type=cache_type, n_threads=1)
    model = model_identity(tiny_mla)
    engine.prefill(TOKENS)
    rows = engine.save()
    filler = CacheRows(rows.layout, 7000, np.zeros(7000 * len(rows.data) // len(TOKENS), np.uint8))
    for distance in DISTANCES:
        engine.load(filler.part(0, distance))
        engine.prefill(TOKENS)
        there, plane = engine.save(distance).planes()[0], rows.layout[0]
        here = moved(rows, model, distance).planes()[0]
        assert (here[:, : len(here[0]) // 2] == there[:, : len(there[0]) // 2]).all()  # the latent's bytes
        step = {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.02, "q5_0": 0.2, "q5_1": 0.2}.get(
            cache_type, 0.4
        )
        a, b = exact(here, plane), exact(there, plane)
        assert np.abs(a - b).max() <= step * np.abs(b).max(), distance
    engine.close()


def exact(rows: np.ndarray, plane: Plane) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType[plane.cache_type.upper()]
    return np.asarray(gguf.quants.dequantize(np.ascontiguousarray(rows), kind))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_turning_is_what_the_forward_pass_does(layout: str) -> None:
    rope = RopeSpec(10000.0, 64, layout, tuple(np.linspace(1, 4, 32)), magnitude=1.2)  # type: ignore[arg-type]
    keys = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)

    def at(start: int) -> np.ndarray:
        return apply_rope(keys[:, None, :], np.arange(start, start + 50), rope)[:, 0]

    for distance in DISTANCES:
        np.testing.assert_allclose(turned(at(0), rope, distance), at(distance), atol=2e-3)
        np.testing.assert_allclose(turned(turned(at(0), rope, distance), rope, -distance), at(0), atol=1e-5)


def test_what_cannot_be_moved_is_refused(tiny_mla: Path, tiny_llama: Path) -> None:
    model = model_identity(tiny_mla)
    plane = Plane("0.key", "iq4_nl", 64)
    rows = CacheRows.empty((plane,) * 3, 0)
    with pytest.raises(
        UnsupportedError, match="rows of iq4_nl cannot be moved; make packs with --cache-type q4_0"
    ):
        moved(rows, model, 1)
    with pytest.raises(
        UnsupportedError, match="belong to their positions; use one pack alone, or convert the model"
    ):
        moved(rows, model_identity(tiny_llama), 1)
    with pytest.raises(UnsupportedError, match="are not its plain latents and cannot be moved; use"):
        moved(CacheRows.empty((plane,) * 6, 0), model, 1)
    with pytest.raises(UnsupportedError, match="belong to their positions"):
        moved(rows, ModelIdentity("unknown", "00"), 1)


def test_an_identity_tells_models_apart(tiny_mla: Path, tmp_path: Path) -> None:
    model = model_identity(tiny_mla)
    assert model.is_latent
    assert model == model_identity(tiny_mla)
    data = bytearray(tiny_mla.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(data)
    other = model_identity(tmp_path / "other.gguf")
    assert replace_tensors(other, model.tensors) == model
    assert other != model


def replace_tensors(model: ModelIdentity, tensors: str) -> ModelIdentity:
    return ModelIdentity(model.name, tensors, model.ranks, model.ropes)
