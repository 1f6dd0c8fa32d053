"""Writer of ONNX folders: a decoder graph, its weights, and all that a program needs to chat with it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from edgekv import __version__
from edgekv.errors import UnsupportedError
from edgekv.export.gguf.write import write_vocabulary
from edgekv.export.onnx.companions import write_companions
from edgekv.export.onnx.weights import BLOCK, LatentCache, Weights
from edgekv.files import atomic_folder, file_sha256, forget_cached
from edgekv.models.identity import ModelIdentity
from edgekv.models.onnx.folder import DATA, GRAPH, MANIFEST, VOCABULARY
from edgekv.models.onnx.manifest import VERSION, FileRecord, LayerRecord, Manifest, ModelRecord, ring_window
from edgekv.progress import Progress
from edgekv.source import TensorSource
from edgekv.spec import ENCODED, GQA, AttentionSpec
from edgekv.tensors import looked_up, weight_flops

# The edgekv.spec.ModelSpec.peculiarities that the graph can express.
EXPRESSED = frozenset(
    {
        ENCODED,
        "biases on queries, keys and values",
        "QK-norm",
        "a sliding window",
        "attention softcapping",
        "a score scale of its own",
        "layers without RoPE",
        "scaled RoPE frequencies",
        "layers that differ",
        "low-rank queries",
        "another feed-forward than SwiGLU",
        "norms after attention and feed-forward",
        "scaled embeddings, residuals or logits",
        "logit softcapping",
    }
)
SCALE_NBYTES = 4  # of a row in an 8-bit cache


@dataclass(frozen=True)
class OnnxOptions:
    """How to write it. `cache` "int8" is for latents only."""

    weights: Weights = "f32"
    cache: LatentCache = "f32"


def write_onnx(
    source: TensorSource,
    folder: Path,
    options: OnnxOptions,
    force: bool,
    progress: Progress,
    identity: ModelIdentity | None = None,
) -> Manifest:
    """Write a model as ONNX into a new folder, which appears when it is complete.

    Weights are taken, written and forgotten one by one, so that memory holds little more than the largest.

    Args:
        identity: of the GGUF that the source is.

    Raises:
        InputError: onnx or onnx-ir is not installed.
        UnsupportedError: the graph cannot express the model.
        OutputError: the folder cannot be written, or exists and `force` is not set.
    """
    from edgekv.export.onnx.decoder import add_decoder
    from edgekv.export.onnx.graph import OPSET, GraphWriter

    _check(source, options)
    with atomic_folder(folder, force, MANIFEST) as partial:
        with (partial / DATA).open("wb") as data:
            graph = GraphWriter(data, DATA)
            add_decoder(graph, source, options.weights, options.cache, progress)
        notes = {"edgekv.version": __version__, "edgekv.model": source.spec.name}
        graph.save(partial / GRAPH, notes)
        write_vocabulary(source, partial / VOCABULARY)
        write_companions(source, partial)
        manifest = Manifest(
            format="edgekv.onnx",
            version=VERSION,
            edgekv=__version__,
            model=_record(source, options, (partial / DATA).stat().st_size),
            opset=OPSET,
            onnxruntime_operators=graph.contrib_kinds(),
            files={p.name: FileRecord(p.stat().st_size, file_sha256(p)) for p in sorted(partial.iterdir())},
            source=identity,
        )
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        forget_cached(partial / DATA)
    return manifest


def _check(source: TensorSource, options: OnnxOptions) -> None:
    """Refuse what the graph would get wrong, before anything is written."""
    spec = source.spec
    if others := [what for what in spec.peculiarities if what not in EXPRESSED]:
        raise UnsupportedError(f"{spec.name} has {others[0]}, which the ONNX graph cannot express; use GGUF")
    if all(isinstance(layer.attention, GQA) for layer in spec.layers) and options.cache != "f32":
        raise UnsupportedError(
            f"{spec.name}: an {options.cache} cache is for MLA; run `edgekv convert` first"
        )
    if options.weights != "f32" and spec.dim % BLOCK:
        raise UnsupportedError(
            f"{spec.name}: a width of {spec.dim} does not divide into blocks of {BLOCK}; use --weights f32"
        )


def _record(source: TensorSource, options: OnnxOptions, weights_nbytes: int) -> ModelRecord:
    spec = source.spec
    attentions = [layer.attention for layer in spec.layers]
    shapes = {name: source.shape(name) for name in source.names()}
    table = sum(prod(shapes[name]) for name in looked_up(spec))
    table_nbytes = table * (4 if options.weights == "f32" else 1 + 4 / BLOCK)
    # Of a table of turns (edgekv.export.onnx.attention.GroupedInputs) a token reads one row too.
    ropes = {a.rope for a in attentions if isinstance(a, GQA) and not a.qk_norm}
    table_nbytes += sum(4 * spec.context_length * rope.dim for rope in ropes)
    layers = tuple(_cached(attention, options.cache, spec.context_length) for attention in attentions)
    return ModelRecord(
        name=spec.name,
        arch=spec.arch,
        attention=attentions[0].kind,
        n_layers=spec.n_layers,
        n_heads=max(attention.n_heads for attention in attentions),
        n_params=sum(map(prod, shapes.values())),
        vocab=spec.vocab,
        context_length=spec.context_length,
        weights=options.weights,
        weights_nbytes=weights_nbytes,
        read_nbytes=weights_nbytes - round(table_nbytes),
        flops=weight_flops(spec, shapes),
        flops_per_cached_token=sum(attention.flops_per_cached_token for attention in attentions),
        cache_type=options.cache,
        cache_values=spec.cache_values,
        cache_nbytes=sum(layer.nbytes for layer in layers),
        layers=layers,
    )


def _cached(attention: AttentionSpec, cache: LatentCache, context_length: int) -> LayerRecord:
    window = ring_window(attention, context_length)
    if isinstance(attention, GQA):
        return LayerRecord("GQA", attention.kv_bytes_per_token("f32"), window)
    if cache == "int8":
        return LayerRecord("MLA", attention.cache_values + SCALE_NBYTES, window)
    return LayerRecord("MLA", attention.kv_bytes_per_token("f32"), window)
