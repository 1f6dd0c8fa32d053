"""How many values each layer of an encoded latent keeps."""

from __future__ import annotations

from edgekv.spec import GQA, LayerSpec, ModelSpec, RopeSpec
from edgekv.workflows.encode import encoded_target


def model(n_layers: int) -> ModelSpec:
    layer = LayerSpec(GQA(12, 2, 128, RopeSpec(1e6, 128)), 64)
    return ModelSpec("m", "qwen2", (layer,) * n_layers, 64, 100, 512, 1e-6, True)


def test_a_share_is_that_of_every_layer() -> None:
    assert encoded_target(model(2), 0.5, None, None).widths == (256, 256)
    assert encoded_target(model(28), 1.0, None, None).widths == (512,) * 28
    assert encoded_target(model(28), None, 192, 64).widths == (256,) * 28
