"""Conversion: from a GQA or MHA model file to one whose cache is a compressed latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekv.convert.layers import METHODS, LayerLoss, convert, convertible_attention
from edgekv.convert.statistics import FitRecipe
from edgekv.convert.target import resolve_target, unscaled_pairs
from edgekv.errors import InputError, ToleranceError
from edgekv.evaluate.verify import Comparison
from edgekv.export.gguf.write import WEIGHT_TYPES, write_gguf
from edgekv.export.onnx.weights import LatentCache
from edgekv.files import check_output, temporary_folder
from edgekv.heal.basis import BASIS_TOKENS, BASIS_WINDOW, in_best_basis
from edgekv.heal.weights import check_base, healed_source, read_healed
from edgekv.models.open import open_model
from edgekv.progress import Progress, Stages, silent
from edgekv.quant.formats import KEEP
from edgekv.reference.ops import inverse_frequencies
from edgekv.rewrite.rope_pairs import with_interleaved_pairs
from edgekv.rewrite.value_scales import with_balanced_values
from edgekv.source import TensorSource
from edgekv.spec import MLA, Metadata, MetaValue, RopeSpec
from edgekv.text.windows import OTHER_KINDS, WINDOW, windows_of_other_kinds
from edgekv.workflows.calibration import calibration_windows, mixed, readable_tokenizer, written_windows
from edgekv.workflows.encode import check_encoded_output, encode, is_encoded_output, write_encoded
from edgekv.workflows.request import Request
from edgekv.workflows.verify import VerifyRequest, verify_models

# KL of llama.cpp's own arithmetic to float32: it multiplies quantized weights by 8-bit activations.
QUANTIZED_KL = 2e-2
SELF_WRITTEN = "sampled from the model"
TEXT_TOKENS = 32768
WRITTEN_TOKENS = 16384  # writing a token takes as long as all else that is done with it
LEAST_WRITTEN = 8192  # tokens, where text spans too little
# Losses on text of other kinds that a fit to sound text does not have: this many times the loss on held-out text of
# the same kind, and at least this share of the attention output's energy.
NARROW_RATIO, NARROW_LEAST = 8.0, 0.1
REMEDY = "give --text of several kinds, or none: then the model writes it"
WHOLE_KL: Mapping[str, float] = MappingProxyType({"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3})


@dataclass(frozen=True)
class ConvertRequest(Request):
    """What to convert, to what size, and where to.

    Give either `target`, the share of the cache's bytes to keep (0.5 keeps half), or `kv_lora_rank`, the width of
    the latent; or `healed`, a file of `edgekv heal` to build from instead of fitting.

    Attributes:
        model: a GGUF file or a Hugging Face folder.
        output: what to write: a name that ends in .gguf is one that llama.cpp runs, one that ends in .edgekv an
            intermediate file for the reference and `export_model`, and any other name an ONNX folder.
        rope_dim: width of the shared rope key (qk_rope_head_dim); by default the head dim, or what loses least where
            the output is no GGUF and `target` says how large a row is.
        nope_dim: query dims per head that read the latent (qk_nope_head_dim).
        value_dim: value dims per head (v_head_dim); by default the head dim.
        weights: format of the weights; "keep" leaves untouched tensors as stored and writes new ones in q8_0. An ONNX
            folder's are "int4" (also for "keep"), "int8" or "f32".
        cache_type: number format of an ONNX folder's cache.
        text: calibration text files; without any the model writes its own.
        text_tokens: tokens to calibrate on; by default TEXT_TOKENS of `text`, or WRITTEN_TOKENS that the model writes.
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
    weights: str = KEEP
    cache_type: LatentCache = "f32"
    text: tuple[Path, ...] = ()
    text_tokens: int | None = None
    seed: int = 0
    verify: bool = False
    force: bool = False

    @property
    def calibration_tokens(self) -> int:
        """`text_tokens`, or its default."""
        if self.text_tokens is not None:
            return self.text_tokens
        return TEXT_TOKENS if self.text else WRITTEN_TOKENS


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        nbytes: size of the file.
        cache_nbytes: bytes of f16 cache per token in all layers, before and after.
        notes: the GGUF keys on how it was made.
        layers: the loss of each layer; empty for healed weights.
        comparison: llama.cpp against the NumPy reference, if the request said `verify`.
        warnings: what was wrong with the calibration text, and the remedy.
    """

    output: Path
    nbytes: int
    cache_nbytes: tuple[int, int]
    notes: Metadata
    layers: tuple[LayerLoss, ...]
    comparison: Comparison | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Conversion:
    """A converted model that is not written yet."""

    model: TensorSource
    notes: Metadata
    losses: tuple[LayerLoss, ...] = ()
    warnings: tuple[str, ...] = ()
    holds: bool = True  # on text of other kinds, as far as it was tried


def convert_model(request: ConvertRequest, progress: Stages = silent) -> ConvertResult:
    """Convert a GQA or MHA model into one whose cache holds one latent and one rope key per token and layer.

    The name of the output decides: a `deepseek2` GGUF for llama.cpp takes plain models only, an ONNX folder all.

        request = edgekv.ConvertRequest(model, output, target=0.5, text=(text,))
        result = edgekv.convert_model(request)
        before, after = result.cache_nbytes

    Raises:
        InputError: an option is impossible, a text cannot be read, or the healed weights are another model's.
        UnsupportedError: the model cannot become MLA; the message says why.
        ModelFileError: the model is malformed, or a weight is not finite.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: llama.cpp, wanted for `verify`, is not installed or failed.
        ToleranceError: `verify` found that llama.cpp computes something else; nothing was written.
    """
    source = open_model(request.model)
    if is_encoded_output(request.output):
        return _encoded(source, request, progress)
    check_output(request.output, request.force)
    _check_gguf_options(request)
    comparisons: list[Comparison] = []
    with temporary_folder("edgekv-convert-") as spill:
        made = (_fitted if request.healed is None else _from_healed)(source, request, spill, progress)

        def check(written: Path) -> None:
            comparisons.append(_verified(written, made, request, progress))

        write_gguf(
            with_balanced_values(made.model),
            request.output,
            request.weights,
            made.notes,
            request.force,
            progress("writing"),
            check if request.verify else None,
        )
    return ConvertResult(
        output=request.output,
        nbytes=request.output.stat().st_size,
        cache_nbytes=(source.spec.kv_bytes_per_token("f16"), made.model.spec.kv_bytes_per_token("f16")),
        notes=made.notes,
        layers=made.losses,
        comparison=comparisons[0] if comparisons else None,
        warnings=made.warnings,
    )


def _check_gguf_options(request: ConvertRequest) -> None:
    if request.weights not in (KEEP, *WEIGHT_TYPES):
        raise InputError(
            f"--weights {request.weights} is for ONNX folders; a GGUF's are {', '.join(WEIGHT_TYPES)}"
        )
    if request.cache_type != "f32":
        raise InputError("--cache-type is for ONNX folders; llama.cpp takes it when it runs the model")


def _encoded(source: TensorSource, request: ConvertRequest, progress: Stages) -> ConvertResult:
    check_encoded_output(request)
    with temporary_folder("edgekv-convert-") as spill:
        converted, notes, losses = encode(source, request, spill, progress)
        nbytes = write_encoded(converted, request, notes, progress)
    return ConvertResult(
        output=request.output,
        nbytes=nbytes,
        cache_nbytes=(source.spec.kv_bytes_per_token("f16"), converted.spec.kv_bytes_per_token("f16")),
        notes=notes,
        layers=tuple(losses),
        comparison=None,
        warnings=(),
    )


def _verified(written: Path, made: _Conversion, request: ConvertRequest, progress: Stages) -> Comparison:
    """llama.cpp against the reference on text of other kinds than the calibration's."""
    text = OTHER_KINDS if readable_tokenizer(made.model) else None
    found = verify_models(VerifyRequest(written, text=text), progress)
    if found.kl <= WHOLE_KL.get(request.weights, QUANTIZED_KL):
        return found
    differs = (
        f"{request.output} was not written: llama.cpp differs from the NumPy reference by KL {found.kl:.2e}"
    )
    if made.holds:
        raise ToleranceError(f"{differs}; please report this")
    raise ToleranceError(
        f"{differs}, since the fit does not hold outside of its calibration text, where llama.cpp's rounding to 8 "
        f"bits grows without bounds; {REMEDY}"
    )


def _fitted(source: TensorSource, request: ConvertRequest, spill: Path, progress: Stages) -> _Conversion:
    """The source converted by fitting on calibration text."""
    original, source = source, with_interleaved_pairs(source)
    gqa = convertible_attention(source.spec, request.fold_biases, unscaled=request.method == "edgekv")
    sizes = (request.target, request.kv_lora_rank, request.rope_dim, request.nope_dim, request.value_dim)
    target = resolve_target(gqa, *sizes)
    recipe = METHODS[request.method]
    if target.value_dim != gqa.head_dim and not recipe.refit_output:
        raise InputError(
            f"--value-dim {target.value_dim} needs a method that refits the outputs; leave it out, or use "
            "--method edgekv"
        )
    windows = calibration_windows(original, request, request.calibration_tokens, WINDOW, spill, progress)
    tokenizer = readable_tokenizer(source)
    elsewhere = windows_of_other_kinds(tokenizer, windows.shape[1]) if tokenizer else None
    names, warnings = [path.name for path in request.text], []
    fit = _Fit(source, target, recipe, spill, elsewhere)
    try:
        converted = fit.run(windows, progress("converting"), wide=not request.text)
    except _TooNarrowError as narrow:
        n_written = max(request.calibration_tokens // 2, LEAST_WRITTEN)
        written = written_windows(original, n_written, windows.shape[1], request.seed, spill, progress)
        windows = mixed(windows, written, request.seed)
        converted = fit.run(windows, progress("converting again, on more kinds of text"), wide=True)
        warnings = [f"{narrow}; {written.size:,} tokens that the model wrote were mixed in; {REMEDY}"]
        names.append(SELF_WRITTEN)
    losses = tuple(fit.losses)
    if not (holds := not _is_narrow(losses)):
        warnings = [f"{_too_narrow(losses)}; {REMEDY}"]
    notes: dict[str, MetaValue] = {
        "edgekv.method": request.method,
        "edgekv.calibration": ", ".join(names) or SELF_WRITTEN,
        "edgekv.calibration_tokens": int(windows.size),
        "edgekv.seed": request.seed,
        "edgekv.source_cache_values": source.spec.cache_values,
        "edgekv.output_error": [round(loss.output_error, 5) for loss in losses],
    }
    if elsewhere is not None:
        notes["edgekv.elsewhere_error"] = [round(loss.elsewhere_error or 0.0, 5) for loss in losses]
    if gqa.bias:
        notes["edgekv.bias_error"] = [round(loss.bias_error, 5) for loss in losses]
    if not gqa.rope.is_plain:
        notes["edgekv.unrotated_pairs"] = gqa.rope.dim // 2 - unscaled_pairs(gqa.rope)
        warnings.append(_unrotated(gqa.rope))
    return _Conversion(converted, notes, losses, tuple(warnings), holds)


def _unrotated(rope: RopeSpec) -> str:
    """What a conversion loses that keeps the pairs alone whose frequencies are not scaled."""
    n, kept = rope.dim // 2, unscaled_pairs(rope)
    period = 2 * np.pi / inverse_frequencies(rope)[kept]
    return (
        f"scaled RoPE: {kept} of {n} pairs keep their frequencies; llama.cpp's deepseek2 graph has none of the others, "
        "which stand still or turn nearly as fast as they should. The fastest of these turns once in "
        f"{period:,.0f} tokens: what lies further back than a quarter of that is read less exactly. "
        "`edgekv eval --against` measures it; an ONNX folder keeps all frequencies"
    )


class _TooNarrowError(Exception):
    """The calibration text spans too little: what is fitted to it does not hold outside of it."""


class _Fit:
    """A conversion that can be run again on other windows; `losses` are those of the last run."""

    def __init__(
        self,
        source: TensorSource,
        target: MLA,
        recipe: FitRecipe,
        spill: Path,
        elsewhere: NDArray[np.int64] | None,
    ) -> None:
        self._source, self._target, self._recipe, self._spill = source, target, recipe, spill
        self._elsewhere = elsewhere
        self.losses: list[LayerLoss] = []

    def run(self, windows: NDArray[np.int64], progress: Progress, wide: bool) -> TensorSource:
        """The converted source; _TooNarrowError at the layer where windows that are not `wide` prove too narrow."""
        self.losses = []

        def layer_done(loss: LayerLoss) -> None:
            self.losses.append(loss)
            progress(loss.layer + 1, self._source.spec.n_layers)
            if not wide and _is_narrow(self.losses):
                raise _TooNarrowError(_too_narrow(self.losses))

        return convert(
            self._source, self._target, windows, self._spill, self._recipe, layer_done, self._elsewhere
        )


def _errors(losses: Sequence[LayerLoss]) -> tuple[float, float]:
    """The mean loss of layers on held-out calibration text, and on text of other kinds."""
    pairs = [(x.output_error, x.elsewhere_error) for x in losses if x.elsewhere_error is not None]
    here, elsewhere = np.mean(pairs, axis=0) if pairs else (0.0, 0.0)
    return float(here), float(elsewhere)


def _is_narrow(losses: Sequence[LayerLoss]) -> bool:
    here, elsewhere = _errors(losses)
    return elsewhere > max(NARROW_RATIO * here, NARROW_LEAST)


def _too_narrow(losses: Sequence[LayerLoss]) -> str:
    here, elsewhere = _errors(losses)
    return (
        f"the calibration text spans too little: attention outputs are off by {here:.3f} on held-out parts of it, by "
        f"{elsewhere:.3f} on text of other kinds"
    )


def _from_healed(source: TensorSource, request: ConvertRequest, spill: Path, progress: Stages) -> _Conversion:
    """The original with healed weights, in the basis in which a quantized cache loses least."""
    healed = request.healed
    assert healed is not None
    convertible_attention(source.spec)
    record, tensors = read_healed(healed)
    check_base(healed, record, source)
    n_tokens = min(request.calibration_tokens, BASIS_TOKENS)
    windows = calibration_windows(source, request, n_tokens, BASIS_WINDOW, spill, progress)
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
    return _Conversion(healed_source(source, record.attention, tensors), notes)
