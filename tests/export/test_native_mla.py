"""MiniCPM3 and PLM in the NumPy reference, against llama.cpp's own graphs."""

from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.open import open_backend
from edgekv.devices.predict.model_info import describe_llama_cache
from edgekv.evaluate.verify import compare
from edgekv.models.open import open_model
from edgekv.spec import MLA

TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 250, 200)]


@pytest.mark.parametrize("form", ["absorbed", "naive"])
def test_reference_equals_llama_cpp(native_mla: Path, form: str) -> None:
    from edgekv.backends.reference import ReferenceBackend

    engine = open_backend(native_mla, "llama.cpp", n_ctx=256, cache_type="f32", n_threads=1)
    reference = ReferenceBackend(open_model(native_mla), 256, form)
    result = compare(reference, engine, TOKENS, lambda done, total: None)
    engine.close()
    assert result.kl < 1e-5
    assert result.argmax_agreement > 0.99


def test_cache_is_the_latent(native_mla: Path) -> None:
    spec = open_model(native_mla).spec
    attention = spec.layers[0].attention
    assert isinstance(attention, MLA)
    assert attention.cache_values == 64 + 32
    engine = open_backend(native_mla, "llama.cpp", n_ctx=256, cache_type="f32", n_threads=1)
    decompressed = 4 * (64 + 32)  # keys and values of 4 heads, which llama.cpp stores
    assert engine.cache_nbytes() == 256 * spec.n_layers * decompressed * 4
    described = describe_llama_cache(spec, "f32", 256)
    assert engine.cache_nbytes() == 256 * (described.nbytes_per_token or 0)
    engine.close()
