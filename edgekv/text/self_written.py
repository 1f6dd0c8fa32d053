"""Calibration text that the model writes itself, for users without a corpus.

The first token of each sequence is drawn from the vocabulary and the rest from the model (LLM-QAT,
arXiv 2305.17888, section 2.1). All sequences advance together: the weights are read once per step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.progress import Progress
from edgekv.reference.model import ReferenceModel
from edgekv.reference.sample import write_on
from edgekv.source import Array, TensorSource
from edgekv.tokenizer.vocab import text_tokens


def sample_windows(
    source: TensorSource, n_windows: int, length: int, seed: int, progress: Progress
) -> NDArray[np.int64]:
    """Token windows (n_windows, length) that the NumPy reference samples at temperature 1."""
    model, rng = ReferenceModel(source), np.random.default_rng(seed)
    cache = model.new_cache(length, n_windows)
    first = rng.choice(text_tokens(source.metadata, source.spec.vocab), n_windows)

    def step(tokens: NDArray[np.int64], position: int) -> Array:
        return model.logits(model.hidden(tokens[:, None], cache)[:, 0])

    return write_on(step, first[:, None], length, rng, progress)
