"""Conversion of a model from GQA to MLA, layer by layer.

Sequential calibration: the hidden states that run from layer to layer are the converted model's, so each layer is
fitted on the inputs that it will really get, to give what the original layer would make of them. Targets from the
original's own hidden states, in a second stream, gained 7 % of the KL at equal calibration for 50 % more time;
more calibration text in one stream gains more. Only one layer's weights are in memory at a time; fitted
ones are spilled to disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.methods import LayerMaps
from edgekv.convert.one_window import QueryRows, View, probe, query_rows
from edgekv.convert.output_fit import fit_outputs
from edgekv.convert.query_fit import fit_queries
from edgekv.convert.statistics import FitRecipe, Job, Seen, advance, mix, observe, without_biases
from edgekv.convert.target import obstacle
from edgekv.convert.transmla import transmla
from edgekv.convert.workers import workers
from edgekv.errors import ModelFileError, OutputError, UnsupportedError
from edgekv.reference.model import BlockWeights, load_block
from edgekv.reference.ops import per_head
from edgekv.rewrite.cache_basis import in_cache_basis, spread
from edgekv.rewrite.norm_trick import fold_norm
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import GQA, MLA, ModelSpec
from edgekv.tensors import layer_tensor_shapes


@dataclass(frozen=True)
class LayerLoss:
    """What one layer lost. output_error: E|y' - y|^2 / E|y|^2 of the attention output, on held-out calibration text;
    elsewhere_error: the same on text of other kinds, None where there is none.

    rope_kept and latent_kept are shares of energy before any refit; latent_kept_at: what other ranks would keep.
    bias_error: the relative error of folded biases, which the others do not see; 0 where there are none. rope_dim:
    how much of the row the rope key was given, where it was to be found; 0 elsewhere.
    """

    layer: int
    rope_kept: float
    latent_kept: float
    output_error: float
    latent_kept_at: dict[int, float]
    bias_error: float = 0.0
    elsewhere_error: float | None = None
    rope_dim: int = 0


FITTED = (
    "attn_q.weight",
    "attn_kv_a_mqa.weight",
    "attn_kv_a_norm.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
    "attn_output.weight",
)


METHODS = {
    "edgekv": FitRecipe(),
    "transmla": FitRecipe(method=transmla, query_iterations=0, refit_output=False, sequential=False),
}


def convert(
    source: TensorSource,
    target: MLA,
    windows: NDArray[np.int64],
    spill: Path,
    recipe: FitRecipe,
    layer_done: Callable[[LayerLoss], None],
    elsewhere: NDArray[np.int64] | None = None,
) -> LazySource:
    """Convert every layer of a GQA source to `target`, calibrated on token windows (n, T).

    Windows of `elsewhere` (m, T) are text of other kinds: nothing is fitted to it, but refits that lose there are
    held back, and each layer's loss there is told.

    The fitted tensors are written to the folder `spill`, which has to outlive the returned source.

    Raises:
        UnsupportedError: the source is not GQA or MHA.
        ModelFileError: a weight is not finite; the message names the tensor.
        OutputError: `spill` is full.
    """
    gqa = convertible_attention(source.spec, fold_biases=True, unscaled=True)
    assert recipe.refit_output or target.value_dim == gqa.head_dim
    n_windows = len(windows)
    if elsewhere is not None:
        windows = np.concatenate([windows, elsewhere])
    states = source.load("token_embd.weight")[windows]
    with workers() as crew:
        job = Job(source.spec, gqa, target, recipe, n_windows, len(windows) - n_windows, crew)
        for i in range(source.spec.n_layers):
            weights = load_block(source, i)
            require_finite(weights, i)
            fitted, loss, states = _convert_layer(weights, job, states, i)
            for name, array in fitted.items():
                save_tensor(spill / f"blk.{i}.{name}.npy", array)
            layer_done(loss)
    return converted_source(source, target, lambda name: np.load(spill / f"{name}.npy"))


def save_tensor(path: Path, array: Array) -> None:
    """Keep a fitted tensor in the temporary folder; raises OutputError if that is full."""
    try:
        np.save(path, array)
    except OSError as error:
        raise OutputError(
            f"the temporary folder {path.parent.parent} cannot hold the converted layers: "
            f"{error.strerror or error}; free some space there, or set TMPDIR to another folder"
        ) from error


def convertible_attention(spec: ModelSpec, fold_biases: bool = False, unscaled: bool = False) -> GQA:
    """The attention that all layers share, if a conversion can start from it; options as `obstacle` has them.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    if (problem := obstacle(spec, fold_biases, unscaled)) is not None:
        raise UnsupportedError(problem)
    attention = spec.layers[0].attention
    assert isinstance(attention, GQA)
    if attention.rope.dim != attention.head_dim:
        raise UnsupportedError(
            f"{spec.name} rotates {attention.rope.dim} of {attention.head_dim} dims per head, llama.cpp's "
            "graph all; convert it into an ONNX folder"
        )
    if attention.rope.layout != "interleaved":
        raise UnsupportedError(
            f"{spec.name} ({spec.arch}) pairs dims for RoPE by halves; run `edgekv convert` on it"
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
    w: BlockWeights, job: Job, states: Array, layer: int
) -> tuple[dict[str, Array], LayerLoss, Array]:
    """Fit one layer: its tensors, what it lost, and the hidden states after it, which overwrite `states`."""
    bias_error = 0.0
    if job.gqa.bias:
        w, bias_error = without_biases(w, job, states)
    seen, views = observe(w, job, states)
    maps = job.recipe.method(w, seen.stats, job.gqa, job.target)
    q = _fit_query_maps(w, job, states, maps, seen, views)
    del views  # only the query fit needs them; the mixed latents need their memory
    latents, fitted, held_out, elsewhere = mix(w, job, states, maps, q, seen)
    v_b, w_o = maps.value, w["attn_output.weight"]
    if job.recipe.refit_output:
        heads = w_o.reshape(len(w_o), job.gqa.n_heads, job.gqa.head_dim)
        start = per_head(heads, maps.value.swapaxes(1, 2)).astype(np.float64)
        v_b, refitted = fit_outputs(fitted, held_out, elsewhere, start, job.target.value_dim)
        w_o = refitted.reshape(len(w_o), -1)
    decode = _decoder(v_b, w_o)
    judged = held_out if held_out.n_tokens else fitted
    error = judged.error(decode.astype(np.float64), seen.energy) / seen.energy
    elsewhere_error = None
    if elsewhere.n_tokens:
        elsewhere_error = (
            elsewhere.error(decode.astype(np.float64), seen.energy_elsewhere) / seen.energy_elsewhere
        )
    tensors = _tensors(w, q, maps, v_b, w_o, job, states)
    if layer < job.spec.n_layers - 1:
        if job.recipe.sequential:
            states = advance(w, job, states, latents, decode)
        else:
            states = advance(w, job, states, seen.mixed, np.ascontiguousarray(w["attn_output.weight"].T))
    kept = maps.rope_kept, maps.latent_kept
    loss = LayerLoss(layer, *kept, error, maps.latent_kept_at, bias_error, elsewhere_error)
    return tensors, loss, states


def _fit_query_maps(
    w: BlockWeights, job: Job, states: Array, maps: LayerMaps, seen: Seen, views: dict[int, View]
) -> QueryRows:
    """Each head's query rows, refitted on the probed windows."""
    w_q = w["attn_q.weight"].reshape(job.gqa.n_heads, job.gqa.head_dim, -1)
    query_map = maps.query_map
    if job.recipe.query_iterations:
        probes = {
            i: probe(job.inputs(w, states[i]), seen.queries[i], maps, view, job.target)
            for i, view in views.items()
        }
        fitted = [probes[i] for i in sorted(probes) if i < job.n_fitted]
        held_out = [probes[i] for i in sorted(probes) if i >= job.n_fitted]
        iterations = job.recipe.query_iterations
        query_map = fit_queries(query_map, fitted, held_out, job.target, iterations, job.workers)
    return query_rows(query_map, w_q, seen.stats.covariance, job.target)


def _decoder(v_b: Array, w_o: Array) -> Array:
    """The map from mixed latents to the layer's output, (H * R, D)."""
    h, v, r = v_b.shape
    blocks = per_head(w_o.reshape(-1, h, v), v_b.swapaxes(1, 2))
    return np.ascontiguousarray(blocks.reshape(len(w_o), h * r).T)


def _tensors(
    w: BlockWeights, q: QueryRows, maps: LayerMaps, v_b: Array, w_o: Array, job: Job, states: Array
) -> dict[str, Array]:
    """The layer in the deepseek2 layout: scores scaled for the engine, the latent folded for its norm."""
    inputs = job.inputs(w, states[spread(job.n_windows)])
    layer = in_cache_basis(
        {
            "q": (q.rows * np.float32(np.sqrt(job.target.head_dim))).reshape(-1, job.spec.dim),
            "kv_a": np.concatenate([maps.latent, maps.rope_key]),
            "k_b": q.k_b,
            "v_b": v_b,
            "output": w_o,
        },
        inputs[:, 1:].reshape(-1, job.spec.dim),
        job.target,
    )
    latent, rope_key = np.split(layer["kv_a"], [job.target.kv_lora_rank])
    mean_square = float(np.mean(np.square(inputs @ latent.T)))
    folded, norm = fold_norm(latent, mean_square, job.spec.norm_eps)
    return {
        "attn_q.weight": layer["q"],
        "attn_kv_a_mqa.weight": np.concatenate([folded, rope_key]),
        "attn_kv_a_norm.weight": norm,
        "attn_k_b.weight": layer["k_b"],
        "attn_v_b.weight": layer["v_b"],
        "attn_output.weight": layer["output"],
    }
