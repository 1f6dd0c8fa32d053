"""The NumPy reference on Hugging Face folders, against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.models.hf.source import HFSource
from edgekv.reference.model import ReferenceModel

from .conftest import MODELS, TOKENS, WITH_PICTURES, Zoo


@pytest.mark.parametrize("name", [*MODELS, *WITH_PICTURES])
def test_reference_gives_transformers_logits(name: str, zoo: Zoo) -> None:
    model = ReferenceModel(HFSource(zoo.folder(name)))
    cache = model.new_cache(len(TOKENS))
    parts = [model.logits(model.hidden(part, cache)) for part in np.split(TOKENS, [33, 60, 61])]
    assert np.abs(np.concatenate(parts) - zoo.logits(name)).max() <= 1e-4
