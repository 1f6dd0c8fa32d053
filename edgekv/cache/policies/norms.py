"""How far each cached row can move a layer's output: the norm of its value behind the output matrix."""

from __future__ import annotations

import numpy as np

from edgekv.source import Array


def output_norms(values: Array, maps: Array) -> Array:
    """||v W||_1, the mean over the heads that share a KV head (arXiv 2502.03805, section 3.2): (G, S).

    Args:
        values: (G, S, V); of a latent its first R values, (1, S, R).
        maps: (H, V, D), from a head's value to the layer's output.
    """
    group = len(maps) // len(values)
    norms = np.zeros(values.shape[:2], np.float32)
    for head, weight in enumerate(maps):
        norms[head // group] += np.abs(values[head // group] @ weight).sum(axis=-1)
    return norms / np.float32(group)


def norm_factors(maps: Array, n_groups: int) -> Array:
    """(G, V, V): factors L with ||v L||_2 = the root mean square of ||v W||_2 over the heads of a KV head.

    V * V products for each row and KV head, in place of V * D for each head. The outputs of one row are many and of
    like size, so that their 1-norm and their 2-norm order rows almost alike.
    """
    by_group = maps.reshape(n_groups, -1, *maps.shape[1:]).astype(np.float64)
    forms = np.einsum("ghvd,ghwd->gvw", by_group, by_group, optimize=True) / by_group.shape[1]
    values, vectors = np.linalg.eigh(forms)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0))[:, None, :], np.float32)


def quick_norms(values: Array, factors: Array) -> Array:
    """(G, S) of values (G, S, V), by `norm_factors`."""
    outputs = values @ factors
    return np.asarray(np.sqrt(np.einsum("gsv,gsv->gs", outputs, outputs)))
