"""Conversion layer by layer to a latent that is encoded when it is written (edgekv.spec.Encoder).

As edgekv.convert.layers, but fitted on keys and values as the model makes them, behind biases and QK-norm and before
RoPE, with the RoPE table, the window and the softcap of each layer. What makes queries, keys and values stays as it
is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.encoded.heads import plain_attention, value_bias_output
from edgekv.convert.encoded.maps import Candidates, Maps
from edgekv.convert.encoded.observe import LayerJob, Seen, advance, mix, observe, probes
from edgekv.convert.layers import LayerLoss, require_finite, save_tensor
from edgekv.convert.output_fit import fit_outputs
from edgekv.convert.query_fit import fit_queries
from edgekv.convert.workers import workers
from edgekv.errors import UnsupportedError
from edgekv.models.gguf.own import OWN_ARCH
from edgekv.reference.model import BlockWeights, load_block
from edgekv.reference.ops import per_head
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import GQA, MLA, ModelSpec
from edgekv.tensors import layer_tensor_shapes

FITTED = (
    "attn_kv_enc.weight",
    "attn_kv_enc.bias",
    "attn_q_map.weight",
    "attn_v_b.weight",
    "attn_output.weight",
    "attn_output.bias",
)


@dataclass(frozen=True)
class EncodedTarget:
    """How large a cached row is to be.

    widths: its values, by layer. rope_dim: how many of them are rotated, None for what loses least. The rest is
    edgekv.convert.statistics.FitRecipe's.
    """

    widths: tuple[int, ...]
    rope_dim: int | None = None
    query_iterations: int = 4
    refit_output: bool = True


def convert_encoded(
    source: TensorSource,
    target: EncodedTarget,
    windows: NDArray[np.int64],
    spill: Path,
    layer_done: Callable[[LayerLoss], None],
) -> LazySource:
    """Convert every layer of a GQA source, calibrated on token windows (n, T).

    The fitted tensors are written to the folder `spill`, which has to outlive the returned source.

    Raises:
        UnsupportedError: the source is not GQA or MHA.
        ModelFileError: a weight is not finite; the message names the tensor.
        OutputError: `spill` is full.
    """
    spec = source.spec
    attentions = require_gqa(spec)
    states = source.load("token_embd.weight")[windows] * np.float32(spec.embedding_scale)
    found: list[MLA] = []
    with workers() as crew:
        for i, attention in enumerate(attentions):
            w = load_block(source, i)
            require_finite(w, i)
            job = LayerJob(spec, i, attention, *plain_attention(attention), len(states), crew)
            tensors, mla, loss, states = _convert_layer(w, job, states, target)
            for name, array in tensors.items():
                save_tensor(spill / f"blk.{i}.{name}.npy", array)
            found.append(mla)
            layer_done(loss)
    return encoded_source(source, found, lambda name: np.load(spill / f"{name}.npy"))


def require_gqa(spec: ModelSpec) -> list[GQA]:
    """Every layer's attention.

    Raises:
        UnsupportedError: one is not GQA or MHA.
    """
    found = []
    for layer in spec.layers:
        if not isinstance(layer.attention, GQA):
            raise UnsupportedError(f"{spec.name} already has MLA; convert takes a GQA or MHA model")
        found.append(layer.attention)
    return found


def encoded_source(source: TensorSource, found: list[MLA], load: Callable[[str], Array]) -> LazySource:
    """The source with its attention replaced: `load` gives each fitted tensor by its canonical name."""
    layers = tuple(
        replace(layer, attention=mla) for layer, mla in zip(source.spec.layers, found, strict=True)
    )
    out = LazySource(replace(source.spec, arch=OWN_ARCH, layers=layers), source.metadata)
    for name in source.names():
        prefix, _, tensor = name.rpartition(".attn_")
        if prefix and tensor == "output.weight":
            layer = layers[int(prefix.removeprefix("blk."))]
            shapes = layer_tensor_shapes(layer.attention, source.spec.dim, layer.ffn_dim)
            for fitted in FITTED:
                full = f"{prefix}.{fitted}"
                out.add(full, shapes[fitted], partial(load, full))
        elif not (prefix and tensor == "v.bias"):
            out.borrow(source, name)
    return out


def _convert_layer(
    w: BlockWeights, job: LayerJob, states: Array, target: EncodedTarget
) -> tuple[dict[str, Array], MLA, LayerLoss, Array]:
    """One layer: its tensors and shape, what it lost, and the hidden states behind it, which overwrite `states`."""
    seen = observe(w, job, states)
    w_o = w["attn_output.weight"]
    candidates = Candidates(seen.stats, w_o, job.gqa)
    maps = candidates.maps(job.source, target.widths[job.layer], target.rope_dim)
    maps = _with_fitted_queries(job, maps, seen, target.query_iterations)
    latents, fitted, held_out = mix(w, job, maps, seen)
    v_b = maps.value
    if target.refit_output:
        heads = w_o.reshape(len(w_o), job.gqa.n_heads, job.gqa.head_dim)
        start = per_head(heads, maps.value.swapaxes(1, 2)).astype(np.float64)
        v_b, refitted = fit_outputs(fitted, held_out, None, start, job.gqa.head_dim)
        w_o = refitted.reshape(len(w_o), -1)
    decode = _decoder(v_b, w_o)
    bias = value_bias_output(w, job.source)
    judged = held_out if held_out.n_tokens else fitted
    error = judged.error(decode.astype(np.float64), seen.energy) / seen.energy
    if job.layer < job.spec.n_layers - 1:
        states = advance(w, job, states, latents, lambda mixed: mixed @ decode + bias)
    loss = LayerLoss(
        job.layer,
        maps.rope_kept,
        maps.latent_kept,
        error,
        maps.latent_kept_at,
        rope_dim=maps.target.rope.dim,
    )
    return _tensors(maps, v_b, w_o, bias, job), maps.target, loss, states


def _with_fitted_queries(job: LayerJob, maps: Maps, seen: Seen, iterations: int) -> Maps:
    """The maps with query maps refitted on the probed windows."""
    if not iterations:
        return maps
    fitted = probes(seen, maps, [i for i in sorted(seen.views) if i < job.n_fitted])
    held_out = probes(seen, maps, [i for i in sorted(seen.views) if i >= job.n_fitted])
    query_map = fit_queries(maps.query_map, fitted, held_out, maps.target, iterations, job.workers)
    return replace(maps, query_map=query_map)


def _decoder(v_b: Array, w_o: Array) -> Array:
    """The map from mixed latents to the layer's output, (H * R, D)."""
    h, v, r = v_b.shape
    blocks = per_head(w_o.reshape(-1, h, v), v_b.swapaxes(1, 2))
    return np.ascontiguousarray(blocks.reshape(len(w_o), h * r).T)


def _tensors(maps: Maps, v_b: Array, w_o: Array, bias: Array, job: LayerJob) -> dict[str, Array]:
    """The layer's new tensors, for heads in the order that the model has them."""
    gqa = job.gqa
    keys, values = np.split(maps.encoder, 2, axis=1)
    by_head = keys.reshape(len(keys), gqa.n_kv_heads, gqa.head_dim)
    keys = job.order.undo(by_head).reshape(keys.shape)
    return {
        "attn_kv_enc.weight": np.concatenate([keys, values], axis=1),
        "attn_kv_enc.bias": maps.offset,
        "attn_q_map.weight": job.order.undo(maps.query_map / np.float32(gqa.score_scale)),
        "attn_v_b.weight": v_b,
        "attn_output.weight": w_o,
        "attn_output.bias": bias,
    }
