"""Cache arithmetic against figures worked out by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec

ROPE = RopeSpec(10000.0, 64)


def test_gqa() -> None:
    smol = GQA(9, 3, 64, ROPE)
    assert smol.cache_values == 384
    assert smol.kv_bytes_per_token("f16") == 768
    assert smol.kv_bytes_per_token("q4_0") == 6 * 36
    assert smol.kv_bytes_per_token("q8_0/q4_0") == 3 * (68 + 36)
    assert smol.flops_per_cached_token == 2 * 9 * 64 * 2
    assert [GQA(8, g, 64, ROPE).kind for g in (8, 2, 1)] == ["MHA", "GQA", "MQA"]
    with pytest.raises(ValueError, match="V: 48 values per head do not divide into q8_0 blocks"):
        GQA(4, 2, 48, ROPE).kv_bytes_per_token("f16/q8_0")


def test_mla() -> None:
    latent = MLA(9, 128, 32, 64, ROPE)
    assert (latent.kind, latent.head_dim, latent.cache_values) == ("MLA", 96, 192)
    assert latent.kv_bytes_per_token("f16") == 384, "half of GQA(9, 3, 64)"
    with pytest.raises(ValueError, match="one row per token"):
        latent.kv_bytes_per_token("q8_0/q4_0")
    assert latent.flops_per_cached_token == 2 * 9 * (128 + 64 + 128), "scores over R + P, sum over R"


def test_a_model_adds_up_its_layers() -> None:
    mixed = (LayerSpec(GQA(9, 3, 64, ROPE), 10), LayerSpec(MLA(9, 128, 32, 64, ROPE), 10))
    model = ModelSpec("llama", "m", mixed, 576, 100, 2048, 1e-5, True)
    assert model.n_layers == 2
    assert model.cache_values == 384 + 192
    assert model.kv_bytes_per_token("f16") == 768 + 384
    with pytest.raises(FrozenInstanceError):
        model.dim = 3  # type: ignore[misc]
