"""Conversion of any GQA family to a latent that is encoded when it is written: an ONNX folder, or an .edgekv file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from edgekv.convert.encoded.division import divide
from edgekv.convert.encoded.layers import EncodedTarget, convert_encoded, require_gqa
from edgekv.convert.layers import LayerLoss
from edgekv.convert.target import SIMD_STEP
from edgekv.errors import InputError
from edgekv.export.gguf.write import WEIGHT_TYPES, write_gguf
from edgekv.export.onnx.weights import Weights
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.files import check_output, check_output_folder
from edgekv.models.gguf.own import SUFFIX
from edgekv.models.onnx.folder import MANIFEST
from edgekv.progress import Stages
from edgekv.quant.formats import KEEP
from edgekv.source import TensorSource
from edgekv.spec import Metadata, MetaValue, ModelSpec
from edgekv.text.windows import WINDOW
from edgekv.workflows.calibration import calibration_windows

if TYPE_CHECKING:
    from edgekv.workflows.convert import ConvertRequest

GGUF_SUFFIX = ".gguf"


def is_encoded_output(path: Path) -> bool:
    """Whether a conversion with this name is one that llama.cpp does not have to run."""
    return path.suffix != GGUF_SUFFIX


def check_encoded_output(request: ConvertRequest) -> None:
    """Refuse, before any work is done, an output that cannot be written, or options that mean nothing for it.

    Raises:
        OutputError, InputError: not so.
    """
    if request.output.suffix == SUFFIX:
        check_output(request.output, request.force)
    else:
        check_output_folder(request.output, request.force, MANIFEST)
    _check_options(request)


def encode(
    source: TensorSource, request: ConvertRequest, spill: Path, progress: Stages
) -> tuple[TensorSource, Metadata, list[LayerLoss]]:
    """The source with encoded latents, the notes on how it was made, and each layer's loss.

    Raises:
        InputError: a size is impossible.
        UnsupportedError: the model has MLA already.
    """
    target = encoded_target(source.spec, request.target, request.kv_lora_rank, request.rope_dim)
    windows = calibration_windows(source, request, request.calibration_tokens, WINDOW, spill, progress)
    if request.target is not None and request.target < 1:
        dividing = progress("dividing the cache over layers")
        widths = divide(
            source, target.widths, target.rope_dim, windows, lambda n: dividing(n, source.spec.n_layers)
        )
        target = replace(target, widths=widths)
    losses: list[LayerLoss] = []
    advance = progress("converting")

    def layer_done(loss: LayerLoss) -> None:
        losses.append(loss)
        advance(loss.layer + 1, source.spec.n_layers)

    converted = convert_encoded(source, target, windows, spill, layer_done)
    notes: dict[str, MetaValue] = {
        "edgekv.method": "encoded",
        "edgekv.calibration": ", ".join(path.name for path in request.text) or "sampled from the model",
        "edgekv.calibration_tokens": int(windows.size),
        "edgekv.seed": request.seed,
        "edgekv.source_cache_values": source.spec.cache_values,
        "edgekv.output_error": [round(loss.output_error, 5) for loss in losses],
    }
    return converted, notes, losses


def write_encoded(converted: TensorSource, request: ConvertRequest, notes: Metadata, progress: Stages) -> int:
    """Write an .edgekv file or an ONNX folder; its bytes.

    Raises:
        OutputError: it exists without `force`, or cannot be written.
    """
    if request.output.suffix == SUFFIX:
        write_gguf(converted, request.output, request.weights, notes, request.force, progress("writing"))
        return request.output.stat().st_size
    weights: dict[str, Weights] = {KEEP: "int4", "int4": "int4", "int8": "int8", "f32": "f32"}
    options = OnnxOptions(weights[request.weights], request.cache_type)
    write_onnx(converted, request.output, options, request.force, progress("exporting"))
    return sum(path.stat().st_size for path in request.output.iterdir())


def encoded_target(
    spec: ModelSpec, share: float | None, rank: int | None, rope_dim: int | None
) -> EncodedTarget:
    """The size of each layer's cached row: a share of what it caches, or a latent and a rope key.

    Shares are not divided over the layers yet (edgekv.convert.encoded.division).

    By share, rope key and latent divide a row between them as loses least, unless `rope_dim` is given.

    Raises:
        InputError: neither or both were given, or a size is out of range.
        UnsupportedError: the model has MLA already.
    """
    attentions = require_gqa(spec)
    if (share is None) == (rank is None):
        raise InputError("say how small: either --target SHARE or --kv-lora-rank RANK")
    most_rope = min(attention.cache_values for attention in attentions) // 2
    if rope_dim is not None and (rope_dim % 2 or not 2 <= rope_dim <= most_rope):
        raise InputError(
            f"--rope-dim {rope_dim} is not possible; it is even, from 2 to {most_rope}; leave it out for the best"
        )
    if share is not None:
        widths = [_width(attention.cache_values, share) for attention in attentions]
    else:
        assert rank is not None
        rope_dim = rope_dim or min(attention.head_dim for attention in attentions)
        widths = [rank + rope_dim] * len(attentions)
    most = min(attention.cache_values for attention in attentions)
    if rank is not None and not 1 <= rank <= most:
        raise InputError(f"--kv-lora-rank {rank} is not possible; this model takes 1 to {most}")
    if rope_dim is not None and rope_dim >= min(widths):
        raise InputError(
            f"--rope-dim {rope_dim} leaves nothing of {min(widths)} values to the latent; make it smaller"
        )
    return EncodedTarget(tuple(widths), rope_dim)


def _width(values: int, share: float) -> int:
    if not 0 < share <= 1:
        raise InputError(f"--target is the share of the cache to keep, between 0 and 1; got {share}")
    width = int(values * share + 1e-9) // SIMD_STEP * SIMD_STEP
    if not width:
        raise InputError(
            f"--target {share} keeps {int(values * share)} of {values} values per "
            f"token and layer; the smallest target for this model is {SIMD_STEP / values:.3f}"
        )
    return width


def _check_options(request: ConvertRequest) -> None:
    name = request.output.name
    folder = request.output.suffix != SUFFIX
    for given, option in (
        (request.method != "edgekv", f"--method {request.method}"),
        (request.fold_biases, "--fold-biases"),
        (request.healed is not None, "--healed"),
        (request.nope_dim is not None, "--nope-dim"),
        (request.value_dim is not None, "--value-dim"),
        (request.verify, "--verify"),
        (not folder and request.cache_type != "f32", f"--cache-type {request.cache_type}"),
    ):
        if given:
            raise InputError(
                f"{option} is for GGUF files; leave it out, or write to a name that ends in .gguf"
            )
    known = get_args(Weights) if folder else tuple(WEIGHT_TYPES)
    if request.weights not in (KEEP, *known):
        what = "an ONNX folder" if folder else f"an {SUFFIX} file"
        raise InputError(
            f"{name} is {what}, whose --weights are {', '.join((KEEP, *known))}; take one of these"
        )
