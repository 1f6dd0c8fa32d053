"""Exports: a model as a GGUF, an ONNX folder or a DeepseekV3 safetensors folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edgekv.errors import InputError
from edgekv.export.deepseek.safetensors_file import DType
from edgekv.export.deepseek.write import write_deepseek
from edgekv.export.gguf.quantize import write_mix
from edgekv.export.gguf.write import WEIGHT_TYPES, stored_weights, write_gguf
from edgekv.export.onnx.weights import LatentCache, Weights
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.files import check_output
from edgekv.heal.weights import load_healed
from edgekv.models.gguf.spec import JOINT_KV_B
from edgekv.models.hf.vision import reads_pictures
from edgekv.models.identity import gguf_identity
from edgekv.models.onnx.manifest import Manifest
from edgekv.models.open import open_model, open_with_tokenizer
from edgekv.progress import Stages, silent
from edgekv.quant.formats import KEEP
from edgekv.workflows.request import Request


@dataclass(frozen=True)
class ExportGGUFRequest(Request):
    """A GGUF that unmodified llama.cpp runs. `weights` "keep" copies them bit by bit."""

    model: Path
    output: Path
    weights: str = KEEP
    force: bool = False


@dataclass(frozen=True)
class ExportGGUFResult:
    """What was written, and where it differs from the source.

    Attributes:
        context_lengths: of the source and of the file, which may be shorter.
        without_vision: the source's vision encoder was left out.
        decompresses_cache: llama.cpp caches decompressed keys and values for this architecture, not its latents.
    """

    output: Path
    architecture: str
    weights: str
    nbytes: int
    context_lengths: tuple[int, int]
    without_vision: bool
    decompresses_cache: bool


@dataclass(frozen=True)
class ExportOnnxRequest(Request):
    """An ONNX folder. `weights`: "f32", "int8" or "int4"; `cache_type` of latents: "f32" or "int8"."""

    model: Path
    output: Path
    weights: Weights = "int4"
    cache_type: LatentCache = "f32"
    force: bool = False


@dataclass(frozen=True)
class ExportSafetensorsRequest(Request):
    """A DeepseekV3 folder of an MLA model, or of `healed` weights and their original."""

    model: Path
    output: Path
    healed: Path | None = None
    weights: DType = "bf16"
    force: bool = False


@dataclass(frozen=True)
class ExportSafetensorsResult:
    """What was written: bytes by file name."""

    output: Path
    weights: DType
    nbytes: dict[str, int]


def export_gguf(request: ExportGGUFRequest, progress: Stages = silent) -> ExportGGUFResult:
    """Write a model as a GGUF, tokenizer and chat template included.

    Raises:
        ModelFileError, UnsupportedError: the model is malformed, or llama.cpp has no architecture for it.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: llama.cpp, wanted for its mixed formats, is not installed or failed.
    """
    check_output(request.output, request.force)
    source = open_with_tokenizer(request.model)
    chosen = stored_weights(source) if request.weights == KEEP else request.weights
    if chosen in WEIGHT_TYPES:
        write_gguf(source, request.output, chosen, {}, request.force, progress("writing"))
    else:
        write_mix(source, request.output, chosen, request.force, progress("writing"))
    written = open_model(request.output).spec
    return ExportGGUFResult(
        output=request.output,
        architecture=written.arch,
        weights=chosen,
        nbytes=request.output.stat().st_size,
        context_lengths=(source.spec.context_length, written.context_length),
        without_vision=request.model.is_dir() and reads_pictures(request.model),
        decompresses_cache=written.arch in JOINT_KV_B,
    )


def export_onnx(request: ExportOnnxRequest, progress: Stages = silent) -> Manifest:
    """Write a model as an ONNX graph with its tokenizer; returns the folder's manifest.

    Raises:
        InputError: an option is impossible.
        ModelFileError, UnsupportedError: the model is malformed, or of a kind that is not handled.
        OutputError: the folder exists without `force`, or cannot be written.
    """
    options = OnnxOptions(request.weights, request.cache_type)
    identity = None if request.model.is_dir() else gguf_identity(request.model)
    return write_onnx(
        open_model(request.model), request.output, options, request.force, progress("exporting"), identity
    )


def export_safetensors(
    request: ExportSafetensorsRequest, progress: Stages = silent
) -> ExportSafetensorsResult:
    """Write an MLA model in DeepseekV3 format, which unmodified transformers loads.

    Raises:
        UnsupportedError: the model is not MLA.
        ModelFileError: a file is malformed.
        OutputError: the folder exists without `force`, or cannot be written.
    """
    source = open_model(request.model)
    if request.healed is not None:
        source = load_healed(request.healed, source)
    names = write_deepseek(source, request.output, request.weights, request.force, progress("writing"))
    sizes = {name: (request.output / name).stat().st_size for name in names}
    return ExportSafetensorsResult(request.output, request.weights, sizes)


ExportRequest = ExportGGUFRequest | ExportOnnxRequest | ExportSafetensorsRequest
ExportResult = ExportGGUFResult | Manifest | ExportSafetensorsResult


def export_model(request: ExportRequest, progress: Stages = silent) -> ExportResult:
    """Write a model in the format that the request's type names.

        edgekv.export_model(edgekv.ExportOnnxRequest(small, folder, weights="int4", cache_type="int8"))

    Raises:
        as `export_gguf`, `export_onnx` and `export_safetensors` do.
    """
    if isinstance(request, ExportGGUFRequest):
        return export_gguf(request, progress)
    if isinstance(request, ExportOnnxRequest):
        return export_onnx(request, progress)
    if isinstance(request, ExportSafetensorsRequest):
        return export_safetensors(request, progress)
    names = ", ".join(kind.__name__ for kind in get_args(ExportRequest))
    raise InputError(f"{type(request).__name__} names no format; there are {names}")
