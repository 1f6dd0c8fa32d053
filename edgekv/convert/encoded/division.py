"""Division of the cache over layers: how many values each layer's rows get of a share of all of them.

What rows of a width lose of a layer's output (edgekv.convert.encoded.maps) is known before any layer is converted, and
an error weighs as it is large beside the residual stream that it is added to. So each step of SIMD_STEP values goes to
the layer in which it saves most of that. In Qwen2.5-1.5B the first layer loses twenty times as much of its stream as
any other (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.encoded.heads import plain_attention, value_bias_output
from edgekv.convert.encoded.layers import require_gqa
from edgekv.convert.encoded.maps import Candidates
from edgekv.convert.encoded.observe import LayerJob, advance, observe
from edgekv.convert.target import SIMD_STEP
from edgekv.convert.workers import workers
from edgekv.reference.model import load_block
from edgekv.source import Array, TensorSource
from edgekv.spec import GQA

N_WINDOWS = 4  # of the calibration windows: widths need less than maps do


def divide(
    source: TensorSource,
    widths: Sequence[int],
    rope_dim: int | None,
    windows: NDArray[np.int64],
    layer_done: Callable[[int], None],
) -> tuple[int, ...]:
    """Widths by layer whose sum is that of `widths` at most, for a GQA source, measured on windows (n, T).

    Layers that cache as many values as each other, in as long a window, share what `widths` gives them: a step in
    another kind of layer is not as many bytes.

    Raises:
        UnsupportedError: the source is not GQA or MHA.
    """
    attentions = require_gqa(source.spec)
    curves = _curves(source, rope_dim, windows[:N_WINDOWS], layer_done)
    divided = list(widths)
    kinds = [(attention.cache_values, attention.window) for attention in attentions]
    for kind in set(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        least = _least_steps(attentions[members[0]], widths[members[0]], rope_dim)
        n_steps = sum(widths[i] for i in members) // SIMD_STEP
        steps = share_steps([curves[i] for i in members], n_steps, least)
        for i, n in zip(members, steps, strict=True):
            divided[i] = n * SIMD_STEP
    return tuple(divided)


def _least_steps(attention: GQA, width: int, rope_dim: int | None) -> int:
    """What no layer goes below: room for one rope component of each frequency, if all layers alike would have it.

    Without it a row loses far more than is estimated (edgekv.convert.encoded.rope_slots).
    """
    if rope_dim is not None:
        return rope_dim // SIMD_STEP + 1
    return max(1, min(width, 2 * attention.head_dim) // SIMD_STEP)


def share_steps(curves: Sequence[Sequence[float]], n_steps: int, least: int = 1) -> list[int]:
    """How many of `n_steps` each curve gets, `least` at least, so that little is lost: curve[i] with i + 1 steps."""
    given = [least] * len(curves)
    left = n_steps - sum(given)
    while left > 0:
        # Curves need not be convex: several steps at once can save more per step than the next one.
        gains = [
            ((curve[have - 1] - curve[have - 1 + more]) / more, -more, i)
            for i, (curve, have) in enumerate(zip(curves, given, strict=True))
            for more in range(1, min(left, len(curve) - have) + 1)
        ]
        if not gains:
            break
        _, more, i = max(gains)
        given[i] -= more
        left += more
    return given


def _curves(
    source: TensorSource, rope_dim: int | None, windows: NDArray[np.int64], layer_done: Callable[[int], None]
) -> list[list[float]]:
    """What each layer loses with 1, 2, ... steps of SIMD_STEP values, as a share of its residual stream."""
    spec = source.spec
    states = source.load("token_embd.weight")[windows] * np.float32(spec.embedding_scale)
    curves = []
    with workers() as crew:
        for i, attention in enumerate(require_gqa(spec)):
            w = load_block(source, i)
            job = LayerJob(spec, i, attention, *plain_attention(attention), len(states), crew)
            seen = observe(w, job, states)
            # The median, since a few tokens have states hundreds of times as large as all others.
            stream = float(np.median(np.square(states).sum(axis=-1)))
            candidates = Candidates(seen.stats, w["attn_output.weight"], job.gqa)
            sizes = range(SIMD_STEP, attention.cache_values + 1, SIMD_STEP)
            curves.append([candidates.lost(size, rope_dim) / stream for size in sizes])
            layer_done(i + 1)
            states = advance(
                w,
                job,
                states,
                seen.mixed,
                partial(_output, w["attn_output.weight"], value_bias_output(w, attention)),
            )
    return curves


def _output(w_o: Array, bias: Array, mixed: Array) -> Array:
    return np.asarray(mixed @ w_o.T + bias)
