"""Quantization: a model's weights in one of llama.cpp's presets, with the error of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.errors import InputError
from edgekv.export.gguf.quantize import TensorReport, calibration_windows, quantizable_header, quantize_gguf
from edgekv.export.gguf.stream import staged_gguf
from edgekv.files import check_output
from edgekv.models.open import open_with_tokenizer
from edgekv.progress import Stages, silent
from edgekv.quant.formats import PRESETS, UNQUANTIZED
from edgekv.source import Array
from edgekv.workflows.request import Request


@dataclass(frozen=True)
class QuantizeRequest(Request):
    """What to quantize, and how.

    Attributes:
        model: a GGUF of any architecture that llama.cpp runs, or a Hugging Face folder.
        output: the GGUF to write.
        weights: llama.cpp's preset, such as "q4_k_m".
        text: calibration text for the importance matrix; without any the model writes its own.
        text_tokens: tokens to measure importance on.
        importance: whether to weigh errors by an importance matrix, measured on the text.
        threads: by default the big physical cores.
    """

    model: Path
    output: Path
    weights: str
    text: tuple[Path, ...] = ()
    text_tokens: int = 8192
    importance: bool = True
    seed: int = 0
    threads: int | None = None
    force: bool = False


@dataclass(frozen=True)
class QuantizeResult:
    """What was written. `nbytes`: sizes of the source and of the output. `importance`: whether it was measured."""

    output: Path
    weights: str
    importance: bool
    source_was_quantized: bool
    nbytes: tuple[int, int]
    tensors: tuple[TensorReport, ...]


def quantize_model(request: QuantizeRequest, progress: Stages = silent) -> QuantizeResult:
    """Quantize a model's weights with llama.cpp in a child process, and measure what each tensor lost.

        before, after = edgekv.quantize_model(edgekv.QuantizeRequest(model, output, "q8_0")).nbytes

    Raises:
        InputError: an option is impossible, a text cannot be read, the output is the model itself.
        ModelFileError, UnsupportedError: the model is malformed, or of a kind that is not handled.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: llama.cpp is not installed, refused the model, or died.
    """
    model, output = request.model, request.output
    check_output(output, request.force)
    if output.exists() and model.exists() and output.samefile(model):
        raise InputError(f"{output} is the model itself; choose another name")
    wanted = request.importance and PRESETS[request.weights].importance != "ignored"
    with ExitStack() as stack:
        staged = None
        if model.is_dir():
            staged = stack.enter_context(staged_gguf(open_with_tokenizer(model), output, wanted))
        path = staged.path if staged else model
        header, quantizer = quantizable_header(path), Quantizer(path, request.threads)
        if staged and wanted:
            staged.wait_all(progress("reading"))
        importance = _importance(request, path, quantizer, progress) if wanted else {}
        reports = quantize_gguf(
            path,
            output,
            request.weights,
            importance,
            quantizer,
            request.force,
            progress("quantizing"),
            staged,
        )
        nbytes = (path.stat().st_size, output.stat().st_size)
    return QuantizeResult(
        output=output,
        weights=request.weights,
        importance=bool(importance),
        source_was_quantized=any(tensor.ggml_type.lower() not in UNQUANTIZED for tensor in header.tensors),
        nbytes=nbytes,
        tensors=tuple(reports),
    )


def _importance(
    request: QuantizeRequest, path: Path, quantizer: Quantizer, progress: Stages
) -> Mapping[str, Array]:
    reading = progress("reading text" if request.text else "sampling calibration text")
    windows = calibration_windows(
        path, list(request.text), request.text_tokens, request.seed, quantizer, reading
    )
    return quantizer.measure(windows, progress("measuring importance"))
