"""Conversion: from a GQA or MHA model file to a GGUF whose cache is a compressed latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.layers import METHODS, LayerLoss, convert, convertible_attention
from edgekv.convert.target import resolve_target
from edgekv.errors import InputError
from edgekv.evaluate.verify import Comparison
from edgekv.export.gguf.write import write_gguf
from edgekv.files import check_output, temporary_folder
from edgekv.heal.basis import BASIS_TOKENS, BASIS_WINDOW, in_best_basis
from edgekv.heal.weights import check_base, healed_source, read_healed
from edgekv.models.open import open_model
from edgekv.progress import Stages, silent
from edgekv.rewrite.rope_pairs import with_interleaved_pairs
from edgekv.rewrite.value_scales import with_balanced_values
from edgekv.source import TensorSource
from edgekv.spec import Metadata, MetaValue
from edgekv.text.windows import WINDOW, windows_from_files, windows_from_model
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.workflows.request import Request
from edgekv.workflows.verify import VerifyRequest, verify_models

# KL of llama.cpp's own arithmetic to float32: it multiplies quantized weights by 8-bit activations.
QUANTIZED_KL = 2e-2
WHOLE_KL: Mapping[str, float] = MappingProxyType({"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3})


@dataclass(frozen=True)
class ConvertRequest(Request):
    """What to convert, to what size, and where to.

    Give either `target`, the share of the cache's bytes to keep (0.5 keeps half), or `kv_lora_rank`, the width of
    the latent; or `healed`, a file of `edgekv heal` to build from instead of fitting.

    Attributes:
        model: a GGUF file or a Hugging Face folder.
        output: the GGUF to write.
        rope_dim: width of the shared rope key (qk_rope_head_dim); by default the head dim.
        nope_dim: query dims per head that read the latent (qk_nope_head_dim).
        value_dim: value dims per head (v_head_dim); by default the head dim.
        weights: format of the weights; "keep" leaves untouched tensors as stored and writes new ones in q8_0.
        text: calibration text files; without any the model writes its own.
        text_tokens: tokens to calibrate on.
        verify: reload the file in llama.cpp and compare it with the NumPy reference.
    """

    model: Path
    output: Path
    target: float | None = None
    kv_lora_rank: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    method: Literal["edgekv", "transmla"] = "edgekv"
    fold_biases: bool = False
    healed: Path | None = None
    weights: str = "keep"
    text: tuple[Path, ...] = ()
    text_tokens: int = 32768
    seed: int = 0
    verify: bool = False
    force: bool = False


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        nbytes: size of the file.
        cache_nbytes: bytes of f16 cache per token in all layers, before and after.
        notes: the GGUF keys on how it was made.
        layers: the loss of each layer; empty for healed weights.
        comparison: llama.cpp against the NumPy reference, if the request said `verify`.
        max_kl: the largest KL that llama.cpp's own arithmetic explains at these weights.
    """

    output: Path
    nbytes: int
    cache_nbytes: tuple[int, int]
    notes: Metadata
    layers: tuple[LayerLoss, ...]
    comparison: Comparison | None
    max_kl: float

    @property
    def verified(self) -> bool:
        """Whether llama.cpp computes what the reference does, as far as it was compared."""
        return self.comparison is None or self.comparison.kl <= self.max_kl


def convert_model(request: ConvertRequest, progress: Stages = silent) -> ConvertResult:
    """Convert a GQA or MHA model into a `deepseek2` GGUF, whose cache holds one latent and one rope key per token.

        request = edgekv.ConvertRequest(model, output, target=0.5, text=(text,))
        result = edgekv.convert_model(request)
        before, after = result.cache_nbytes

    Raises:
        InputError: an option is impossible, a text cannot be read, or the healed weights are another model's.
        UnsupportedError: the model cannot become MLA; the message says why.
        ModelFileError: the model is malformed, or a weight is not finite.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: llama.cpp, wanted for `verify`, is not installed or failed.
    """
    check_output(request.output, request.force)
    source = open_model(request.model)
    with temporary_folder("edgekv-convert-") as spill:
        if request.healed is not None:
            converted, notes = _from_healed(source, request, request.healed, progress)
            losses: list[LayerLoss] = []
        else:
            converted, notes, losses = _fitted(source, request, spill, progress)
        converted = with_balanced_values(converted)
        write_gguf(converted, request.output, request.weights, notes, request.force, progress("writing"))
    return ConvertResult(
        output=request.output,
        nbytes=request.output.stat().st_size,
        cache_nbytes=(source.spec.kv_bytes_per_token("f16"), converted.spec.kv_bytes_per_token("f16")),
        notes=notes,
        layers=tuple(losses),
        comparison=verify_models(VerifyRequest(request.output), progress) if request.verify else None,
        max_kl=WHOLE_KL.get(request.weights, QUANTIZED_KL),
    )


def _fitted(
    source: TensorSource, request: ConvertRequest, spill: Path, progress: Stages
) -> tuple[TensorSource, Metadata, list[LayerLoss]]:
    """The source converted by fitting on calibration text, the GGUF notes on how, and each layer's loss."""
    source = with_interleaved_pairs(source)
    gqa = convertible_attention(source.spec, request.fold_biases)
    sizes = (request.target, request.kv_lora_rank, request.rope_dim, request.nope_dim, request.value_dim)
    target = resolve_target(gqa, *sizes)
    recipe = METHODS[request.method]
    if target.value_dim != gqa.head_dim and not recipe.refit_output:
        raise InputError(
            f"--value-dim {target.value_dim} needs a method that refits the outputs; leave it out, or use "
            "--method edgekv"
        )
    windows = _calibration(source, request, request.text_tokens, WINDOW, progress)
    losses: list[LayerLoss] = []
    advance = progress("converting")

    def layer_done(loss: LayerLoss) -> None:
        losses.append(loss)
        advance(loss.layer + 1, source.spec.n_layers)

    converted = convert(source, target, windows, spill, recipe, layer_done)
    notes: dict[str, MetaValue] = {
        "edgekv.method": request.method,
        "edgekv.calibration": ", ".join(path.name for path in request.text) or "sampled from the model",
        "edgekv.calibration_tokens": int(windows.size),
        "edgekv.seed": request.seed,
        "edgekv.source_cache_values": source.spec.cache_values,
        "edgekv.output_error": [round(loss.output_error, 5) for loss in losses],
    }
    if gqa.bias:
        notes["edgekv.bias_error"] = [round(loss.bias_error, 5) for loss in losses]
    return converted, notes, losses


def _from_healed(
    source: TensorSource, request: ConvertRequest, healed: Path, progress: Stages
) -> tuple[TensorSource, Metadata]:
    """The original with healed weights, in the basis in which a quantized cache loses least."""
    convertible_attention(source.spec)
    record, tensors = read_healed(healed)
    check_base(healed, record, source)
    n_tokens = min(request.text_tokens, BASIS_TOKENS)
    windows = _calibration(source, request, n_tokens, BASIS_WINDOW, progress)
    basis = progress("choosing the basis of the cache")
    tensors = in_best_basis(source, record.attention, tensors, windows, basis)
    last = record.evaluations[-1]
    notes: Metadata = {
        "edgekv.method": "healed",
        "edgekv.healed_tokens": record.tokens_seen,
        "edgekv.healed_on": ", ".join(data.name for data in record.data),
        "edgekv.healed_for_cache": record.recipe.cache_type,
        "edgekv.healed_kl": round(last.kl, 5),
        "edgekv.healed_kl_text": record.evaluation_text,
        "edgekv.source_cache_values": source.spec.cache_values,
    }
    return healed_source(source, record.attention, tensors), notes


def _calibration(
    source: TensorSource, request: ConvertRequest, n_tokens: int, written: int, progress: Stages
) -> NDArray[np.int64]:
    """Calibration windows: of the request's text, or of text that the model writes, in windows of `written` tokens."""
    if n_tokens < 1:
        raise InputError("--text-tokens takes a positive number")
    if request.text:
        tokenizer = Tokenizer.from_metadata(source.metadata)
        return windows_from_files(list(request.text), tokenizer, n_tokens, request.seed)
    writing = progress("sampling calibration text")
    return windows_from_model(source, n_tokens, request.seed, writing, written)
