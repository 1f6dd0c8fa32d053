"""What queries to come are like, from those so far: edgekv.cache.policies.base.Probe."""

from __future__ import annotations

import numpy as np

from edgekv.cache.policies.base import Probe
from edgekv.reference.ops import apply_rope
from edgekv.source import Array
from edgekv.spec import GQA, MLA

AHEAD = 512  # positions to come


def without_rope(queries: Array, first: int, spec: GQA | MLA) -> Array:
    """Queries (T, H, K) of tokens from position `first` on, turned back; of a latent its last P dims."""
    start = spec.kv_lora_rank if isinstance(spec, MLA) else 0
    positions = np.arange(first, first + len(queries))
    back = apply_rope(np.ascontiguousarray(queries[..., start:]), -positions, spec.rope)
    back = back / np.float32(spec.rope.magnitude**2)
    return np.concatenate([queries[..., :start], back], axis=-1)


def probe_ahead(mean: Array, covariance: Array, position: int, spec: GQA | MLA) -> Probe:
    """Means (H, K) and covariances (H, K, K) of queries without RoPE, as queries from `position` on will have them."""
    start = spec.kv_lora_rank if isinstance(spec, MLA) else 0
    width = mean.shape[-1] - start
    axes = np.broadcast_to(np.eye(width, dtype=np.float32), (AHEAD, width, width))
    turn = np.eye(mean.shape[-1], dtype=np.float32)
    turn[start:, start:] = apply_rope(axes, np.arange(position, position + AHEAD), spec.rope).mean(axis=0)
    return Probe(np.asarray(mean @ turn, np.float32), np.asarray(turn.T @ covariance @ turn, np.float32))
