"""The basis of a healed student's cache in which quantization loses least (edgekv/rewrite/cache_basis.py).

Training moves towards that basis, but slowly, even where it simulates the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgekv.cache.store import KVCache
from edgekv.heal.weights import MEAN_SQUARE, healed_source
from edgekv.progress import Progress
from edgekv.reference.model import block_forward, load_block
from edgekv.reference.ops import rms_norm
from edgekv.rewrite.cache_basis import ATTENTION, in_cache_basis
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA

BASIS_TOKENS = 4096  # of text are enough to choose a basis by
BASIS_WINDOW = 256  # tokens, where the model writes it: half the steps of a calibration window


def in_best_basis(
    source: TensorSource,
    spec: MLA,
    tensors: Mapping[str, Array],
    windows: NDArray[np.int64],
    progress: Progress,
) -> dict[str, Array]:
    """Stacked tensors of a student, as `healed_source` takes them, each layer in its cache basis.

    The student runs on token windows (n, T), T > 1, for each layer's inputs; `progress` counts layers.
    """
    student = healed_source(source, spec, tensors)
    eps = student.spec.norm_eps
    states = source.load("token_embd.weight")[windows]
    caches = [KVCache(student.spec, windows.shape[1]) for _ in windows]
    changed: dict[str, list[Array]] = {name: [] for name in (*ATTENTION, MEAN_SQUARE)}
    for i in range(student.spec.n_layers):
        w = load_block(student, i)
        inputs = rms_norm(states, w["attn_norm.weight"], eps)
        layer = in_cache_basis(
            {name: tensors[name][i] for name in ATTENTION}, inputs[:, 1:].reshape(-1, student.spec.dim), spec
        )
        latents = inputs @ layer["kv_a"][: spec.kv_lora_rank].T
        layer[MEAN_SQUARE] = np.mean(np.square(latents))
        for name, array in layer.items():
            changed[name].append(array)
        for x, cache in zip(states, caches, strict=True):
            x[:] = block_forward(x, w, student.spec, i, cache)
        progress(i + 1, student.spec.n_layers)
    return {**tensors, **{name: np.stack(arrays) for name, arrays in changed.items()}}
