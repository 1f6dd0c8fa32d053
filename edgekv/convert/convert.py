"""GQA in, MLA out, layer by layer.

Sequential calibration: two streams of hidden states run side by side, the original's and the converted model's.
Each layer is fitted on the inputs that it will really get, the converted stream's, to give the output that the
original gives on its own stream. Only one layer's weights are in memory at a time; fitted ones are spilled to disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.attention import attend
from edgekv.convert.layer import LayerMaps, LayerStats, Method, complex_joint
from edgekv.convert.linalg import factor, sqrt_and_inverse
from edgekv.convert.norm_trick import fold_norm
from edgekv.convert.output_fit import fit_outputs
from edgekv.convert.query_fit import Probe, fit_queries, rotate_rope_part
from edgekv.convert.transmla import transmla
from edgekv.errors import ModelFileError, OutputError, UnsupportedError
from edgekv.gguf_spec import layer_tensor_shapes
from edgekv.model import BlockWeights, load_block
from edgekv.ops import apply_rope, per_head, rms_norm, swiglu
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import GQA, MLA, ModelSpec

PROBE_TOKENS = 512  # of a calibration window, for statistics that need its attention matrix
MAX_PROBES = 8


@dataclass(frozen=True)
class LayerLoss:
    """What one layer lost. output_error: E|y' - y|^2 / E|y|^2 of the attention output, on calibration text."""

    layer: int
    rope_kept: float
    latent_kept: float
    output_error: float


Progress = Callable[[LayerLoss], None]


@dataclass(frozen=True)
class Recipe:
    """How a layer is fitted: the method that finds its maps, and what is refitted behind them.

    sequential: layers see the inputs that the converted layers before them give, not the original's.
    """

    method: Method = complex_joint
    query_iterations: int = 4
    refit_output: bool = True
    sequential: bool = True


FITTED = (
    "attn_q.weight",
    "attn_kv_a_mqa.weight",
    "attn_kv_a_norm.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
    "attn_output.weight",
)


METHODS = {
    "edgekv": Recipe(),
    "transmla": Recipe(method=transmla, query_iterations=0, refit_output=False, sequential=False),
}


@dataclass
class _Stream:
    """Hidden states of all windows, (T, D) each, for the original and for the converted model."""

    original: list[Array]
    converted: list[Array]


def convert(
    source: TensorSource,
    target: MLA,
    windows: NDArray[np.int64],
    spill: Path,
    recipe: Recipe,
    progress: Progress,
) -> LazySource:
    """Convert every layer of a GQA source to `target`, calibrated on token windows (n, T).

    The fitted tensors are written to the folder `spill`, which has to outlive the returned source.

    Raises:
        UnsupportedError: the source is not GQA or MHA.
        ModelFileError: a weight is not finite; the message names the tensor.
        OutputError: `spill` is full.
    """
    gqa = convertible_attention(source.spec)
    assert recipe.refit_output or target.value_dim == gqa.head_dim
    embed = source.load("token_embd.weight")
    states = [embed[window] for window in windows]
    stream = _Stream(states, [state.copy() for state in states])
    for i in range(source.spec.n_layers):
        weights = load_block(source, i)
        require_finite(weights, i)
        fitted, loss = _convert_layer(weights, stream, source.spec, gqa, target, i, recipe)
        for name, array in fitted.items():
            _save(spill / f"blk.{i}.{name}.npy", array)
        progress(loss)
    return converted_source(source, target, lambda name: np.load(spill / f"{name}.npy"))


def _save(path: Path, array: Array) -> None:
    try:
        np.save(path, array)
    except OSError as error:
        raise OutputError(
            f"the temporary folder {path.parent.parent} cannot hold the converted layers: "
            f"{error.strerror or error}; free some space there, or set TMPDIR to another folder"
        ) from error


def convertible_attention(spec: ModelSpec) -> GQA:
    """The attention that all layers share, if a conversion can start from it.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    attention = spec.layers[0].attention
    if not isinstance(attention, GQA):
        raise UnsupportedError(f"{spec.name} already has MLA; convert takes a GQA or MHA model")
    if attention.rope.dim != attention.head_dim or attention.rope.layout != "interleaved":
        raise UnsupportedError(
            f"{spec.name} rotates {attention.rope.dim} of {attention.head_dim} dims a head; convert needs all"
        )
    return attention


def require_finite(weights: BlockWeights, layer: int) -> None:
    """Raise ModelFileError on NaN or infinity, naming the tensor."""
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise ModelFileError(
                f"blk.{layer}.{name} holds NaN or infinity; download or export the model again"
            )


def converted_source(source: TensorSource, target: MLA, load: Callable[[str], Array]) -> LazySource:
    """The source with its attention replaced: `load` gives each fitted tensor by its canonical name."""
    spec = replace(
        source.spec,
        arch="deepseek2",
        layers=tuple(replace(layer, attention=target) for layer in source.spec.layers),
    )
    out = LazySource(spec, source.metadata)
    for name in source.names():
        prefix, _, tensor = name.rpartition(".attn_")
        if not prefix or tensor == "norm.weight":
            out.borrow(source, name)
        elif tensor == "q.weight":
            shapes = layer_tensor_shapes(target, spec.dim, spec.layers[0].ffn_dim)
            for fitted in FITTED:
                full = f"{prefix}.{fitted}"
                out.add(full, shapes[fitted], partial(load, full))
    return out


def _convert_layer(
    w: BlockWeights, stream: _Stream, spec: ModelSpec, gqa: GQA, target: MLA, layer: int, recipe: Recipe
) -> tuple[dict[str, Array], LayerLoss]:
    """Fit one layer and advance both streams through it."""
    original = [rms_norm(x, w["attn_norm.weight"], spec.norm_eps) for x in stream.original]
    converted = [rms_norm(x, w["attn_norm.weight"], spec.norm_eps) for x in stream.converted]
    outputs = [_gqa_output(x, w, gqa) for x in original]  # (T, D) each: what the layer has to give
    views = [_attention_view(x, w, gqa) for x in original[:MAX_PROBES]]
    maps = recipe.method(w, _statistics(converted, views, outputs, gqa), gqa, target)
    w_q = w["attn_q.weight"].reshape(gqa.n_heads, gqa.head_dim, -1)
    reading = maps.reading
    if recipe.query_iterations:
        probes = [_probe(x, w_q, maps, view, target) for x, view in zip(converted, views, strict=False)]
        reading = fit_queries(reading, probes, target, recipe.query_iterations)
    del views
    q_rows = _query_rows(reading, w_q, converted, target)
    mixed = [_mixed_latents(x, q_rows, maps, target) for x in converted]  # (T, H, R) each
    v_b, w_o = _output_maps(maps, w, mixed, outputs, gqa, target, recipe)
    error = energy = 0.0
    for i, (mix, output) in enumerate(zip(mixed, outputs, strict=True)):
        given = per_head(mix, v_b).reshape(len(mix), -1) @ w_o.T
        error += float(np.square(given - output).sum())
        energy += float(np.square(output).sum())
        stream.original[i] = _feed_forward(stream.original[i] + output, w, spec.norm_eps)
        if recipe.sequential:
            stream.converted[i] = _feed_forward(stream.converted[i] + given, w, spec.norm_eps)
        else:
            stream.converted[i] = stream.original[i]
    tensors = _tensors(q_rows, maps, v_b, w_o, converted, spec, target)
    return tensors, LayerLoss(layer, maps.rope_kept, maps.latent_kept, error / energy)


def _statistics(converted: list[Array], views: list[_View], outputs: list[Array], gqa: GQA) -> LayerStats:
    n_tokens = sum(len(x) for x in converted)
    covariance = np.zeros((converted[0].shape[1],) * 2)
    for x in converted:
        covariance += x.T @ x
    covariance /= n_tokens
    mixed = np.zeros_like(covariance)
    for x, view in zip(converted, views, strict=False):
        seen = (view.attention @ x[None, : view.attention.shape[-1]]).reshape(-1, x.shape[1])
        mixed += seen.T @ seen
    rows = sum(view.attention.shape[0] * view.attention.shape[1] for view in views)
    power = sum(float(np.square(y).sum()) for y in outputs) / n_tokens
    return LayerStats(covariance, mixed / rows, float(np.sqrt(power / gqa.n_heads)))


@dataclass(frozen=True)
class _View:
    """The original's scores and attention (H, T, T) on the first tokens of a window."""

    scores: Array
    attention: Array


def _project(x: Array, weight: Array, heads: int) -> Array:
    return (x @ weight.T).reshape(len(x), heads, -1)


def _gqa_mix(x: Array, w: BlockWeights, gqa: GQA) -> tuple[Array, Array, Array]:
    """Rotated queries (T, H, K), rotated keys (G, T, K) and values (G, T, K) of normed inputs x (T, D)."""
    positions = np.arange(len(x))
    q = apply_rope(_project(x, w["attn_q.weight"], gqa.n_heads), positions, gqa.rope)
    k = apply_rope(_project(x, w["attn_k.weight"], gqa.n_kv_heads), positions, gqa.rope)
    return q, k.swapaxes(0, 1), _project(x, w["attn_v.weight"], gqa.n_kv_heads).swapaxes(0, 1)


def _gqa_output(x: Array, w: BlockWeights, gqa: GQA) -> Array:
    mixed = attend(*_gqa_mix(x, w, gqa), gqa.head_dim**-0.5)
    return mixed.reshape(len(x), -1) @ w["attn_output.weight"].T


def _attention_view(x: Array, w: BlockWeights, gqa: GQA) -> _View:
    q, k, _ = _gqa_mix(x[:PROBE_TOKENS], w, gqa)
    keys = np.repeat(k, gqa.n_heads // gqa.n_kv_heads, axis=0)  # (H, T, K)
    scores = (q.swapaxes(0, 1) * np.float32(gqa.head_dim**-0.5)) @ keys.swapaxes(1, 2)
    future = np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)
    masked = np.asarray(scores + future, dtype=np.float32)
    attention = np.exp(masked - masked.max(axis=-1, keepdims=True))
    attention /= attention.sum(axis=-1, keepdims=True)
    return _View(np.asarray(scores, dtype=np.float32), attention.astype(np.float32, copy=False))


def _cached_rows(x: Array, maps: LayerMaps, target: MLA) -> Array:
    """What the converted layer caches for normed inputs x: (T, R + P), the rope key rotated."""
    rows = np.concatenate([x @ maps.latent.T, x @ maps.rope_key.T], axis=-1)
    return rotate_rope_part(rows[:, None], target, +1)[:, 0]


def _probe(x: Array, w_q: Array, maps: LayerMaps, view: _View, target: MLA) -> Probe:
    seen = x[: view.scores.shape[-1]]
    queries = (seen @ w_q.reshape(-1, seen.shape[1]).T).reshape(len(seen), *w_q.shape[:2])
    return Probe(queries, _cached_rows(seen, maps, target), view.scores, view.attention)


@dataclass(frozen=True)
class _QueryRows:
    """attn_q (H, N + P, D) without the 1/sqrt(N + P) that the engine applies, and attn_k_b (H, R, N)."""

    rows: Array
    k_b: Array


def _query_rows(reading: Array, w_q: Array, inputs: list[Array], target: MLA) -> _QueryRows:
    """Split each head's reading (R + P, K) of its query into attn_q rows and attn_k_b of rank N."""
    r, n = target.kv_lora_rank, target.nope_dim
    h, _, d = w_q.shape
    k_b = np.zeros((h, r, n), np.float32)
    rows = np.zeros((h, n + target.rope.dim, d), np.float32)
    for i in range(h):
        queries = np.concatenate([x @ w_q[i].T for x in inputs[:MAX_PROBES]]).astype(np.float64)
        root, inverse_root = sqrt_and_inverse(queries.T @ queries / len(queries))
        left, right = factor(reading[i, :r].astype(np.float64), root, inverse_root, n)
        k_b[i] = left
        rows[i] = np.concatenate([right, reading[i, r:]]) @ w_q[i]
    return _QueryRows(rows, k_b)


def _mixed_latents(x: Array, q: _QueryRows, maps: LayerMaps, target: MLA) -> Array:
    """Attention over the cached rows: each head's weighted sum of latents, (T, H, R)."""
    n, r = target.nope_dim, target.kv_lora_rank
    queries = (x @ q.rows.reshape(-1, x.shape[1]).T).reshape(len(x), *q.rows.shape[:2])
    latent_part = per_head(queries[..., :n], q.k_b)
    full = rotate_rope_part(np.concatenate([latent_part, queries[..., n:]], axis=-1), target, +1)
    rows = _cached_rows(x, maps, target)[None]
    return attend(full, rows, rows[..., :r], 1.0)


def _output_maps(
    maps: LayerMaps,
    w: BlockWeights,
    mixed: list[Array],
    outputs: list[Array],
    gqa: GQA,
    target: MLA,
    recipe: Recipe,
) -> tuple[Array, Array]:
    """attn_v_b (H, V, R) and attn_output (D, H * V)."""
    w_o = w["attn_output.weight"]
    if not recipe.refit_output:
        return maps.value, w_o
    heads = w_o.reshape(len(w_o), gqa.n_heads, gqa.head_dim)
    start = per_head(heads, maps.value.swapaxes(1, 2)).astype(np.float64)
    v_b, fitted = fit_outputs(np.concatenate(mixed), np.concatenate(outputs), start, target.value_dim)
    return v_b, fitted.reshape(len(fitted), -1)


def _feed_forward(x: Array, w: BlockWeights, eps: float) -> Array:
    normed = rms_norm(x, w["ffn_norm.weight"], eps)
    return x + swiglu(normed, w["ffn_gate.weight"], w["ffn_up.weight"], w["ffn_down.weight"])


def _tensors(
    q: _QueryRows, maps: LayerMaps, v_b: Array, w_o: Array, inputs: list[Array], spec: ModelSpec, target: MLA
) -> dict[str, Array]:
    """The layer in the deepseek2 layout: scores scaled for the engine, the latent folded for its norm."""
    mean_square = float(np.mean([np.square(x @ maps.latent.T).mean() for x in inputs]))
    folded, norm = fold_norm(maps.latent, mean_square, spec.norm_eps)
    scale = np.float32(np.sqrt(target.head_dim))
    return {
        "attn_q.weight": (q.rows * scale).reshape(-1, spec.dim),
        "attn_kv_a_mqa.weight": np.concatenate([folded, maps.rope_key]),
        "attn_kv_a_norm.weight": norm,
        "attn_k_b.weight": q.k_b,
        "attn_v_b.weight": v_b,
        "attn_output.weight": w_o,
    }
