"""Quantized GGUFs: llama.cpp rounds the weights, EdgeKV says which errors count and measures them.

Everything native runs in a child process (edgekv.backends.isolated.quantizer), on a file whose header was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.errors import BackendError, InputError
from edgekv.export.gguf.stream import LATENT_ENCODER, StagedGGUF, staged_gguf
from edgekv.files import atomic_path
from edgekv.models.gguf.header import kept_header, read_header
from edgekv.models.gguf.layout import GGUFHeader, TensorInfo
from edgekv.models.gguf.spec import whole_model_architecture
from edgekv.progress import Progress
from edgekv.quant.formats import PRESETS, Preset, fell_back
from edgekv.quant.tensor_error import RelativeError, StoredTensor, relative_error
from edgekv.rewrite.norm_trick import is_folded
from edgekv.source import Array, TensorSource
from edgekv.text.self_written import self_written
from edgekv.text.windows import windows_from_files
from edgekv.tokenizer.language import opening_tokens
from edgekv.tokenizer.tokenizer import Tokenizer

SAMPLE_LENGTH = 256  # tokens: short sequences need fewer steps
SAMPLED_SIDE_BY_SIDE = 2  # batches: of any model, whose caches may be large


@dataclass(frozen=True)
class TensorReport:
    """One quantized tensor. error: None where gguf-py cannot read the type. fell_back: see quant.formats."""

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    nbytes_before: int
    nbytes_after: int
    fell_back: bool
    error: RelativeError | None


def quantizable_header(path: Path) -> GGUFHeader:
    """The header of a file that may be handed to llama.cpp.

    Raises:
        ModelFileError: it is malformed.
        UnsupportedError: it is one part of a model.
    """
    header = kept_header(path)
    whole_model_architecture(header.metadata, path)
    return header


def calibration_windows(
    path: Path, texts: list[Path], n_tokens: int, seed: int, quantizer: Quantizer, progress: Progress
) -> NDArray[np.int64]:
    """Token windows (n, length) from text files, or sampled from the model where there are none.

    Raises:
        InputError: a text cannot be read, is too short, or n_tokens is not positive.
        UnsupportedError: the tokenizer is of a kind that EdgeKV does not read.
    """
    if n_tokens < 1:
        raise InputError("--text-tokens takes a positive number; 8192 is the default")
    tokenizer = Tokenizer.from_metadata(kept_header(path).metadata)
    opening = opening_tokens(tokenizer)  # models trained with BOS fail without it
    if not texts:
        return _sampled_windows(path, opening, n_tokens, seed, quantizer, progress)
    windows = windows_from_files(texts, tokenizer, n_tokens, seed)
    windows[:, : len(opening)] = opening
    return windows


def _sampled_windows(
    path: Path, opening: list[int], n_tokens: int, seed: int, quantizer: Quantizer, progress: Progress
) -> NDArray[np.int64]:
    """Windows that the model writes, each from another first token, behind the tokens of `opening`."""
    header = kept_header(path)
    length = min(SAMPLE_LENGTH, header.trained_context or SAMPLE_LENGTH)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)  # the tokenizer was read
    shape = max(1, n_tokens // length), length
    workers = min(quantizer.n_threads, SAMPLED_SIDE_BY_SIDE)
    return self_written(
        quantizer.sample, header.metadata, len(tokens), opening, shape, seed, progress, n_workers=workers
    )


def quantize_gguf(
    source: Path,
    output: Path,
    preset_name: str,
    importance: Mapping[str, Array],
    quantizer: Quantizer,
    force: bool,
    progress: Progress,
    staged: StagedGGUF | None = None,
) -> list[TensorReport]:
    """Write `output` and compare it with `source`, tensor by tensor.

    Args:
        staged: the source, where it is still being written.

    Raises:
        InputError: the preset needs an importance matrix.
        OutputError: the output cannot be written.
        BackendError: llama.cpp refused the model or failed.
    """
    preset, header = PRESETS[preset_name], quantizable_header(source)
    if preset.importance == "needed" and not importance:
        raise InputError(f"{preset_name} is useless without an importance matrix; leave out --no-importance")
    with atomic_path(output, force) as partial:

        def advance(done: int, total: int, _: str = "", /) -> None:
            progress(done, 2 * total)  # then they are compared

        _quantize(source, header, partial, preset, importance, quantizer, advance, staged)
        return _compare(source, header, partial, preset, importance, quantizer.n_threads, progress)


def write_mix(source: TensorSource, output: Path, preset_name: str, force: bool, progress: Progress) -> None:
    """Write a source as GGUF in one of llama.cpp's presets, all errors weighed alike; raises as quantize_gguf."""
    with staged_gguf(source, output) as staged, atomic_path(output, force) as partial:
        header, quantizer = read_header(staged.path), Quantizer(staged.path)
        _quantize(staged.path, header, partial, PRESETS[preset_name], {}, quantizer, progress, staged)


def _quantize(
    source: Path,
    header: GGUFHeader,
    partial: Path,
    preset: Preset,
    importance: Mapping[str, Array],
    quantizer: Quantizer,
    progress: Progress,
    staged: StagedGGUF | None,
) -> None:
    if staged is None:
        quantizer.quantize(partial, preset.file_type, importance, _kept(source, header), progress)
        return
    for tensor in header.tensors:
        if tensor.name.endswith(LATENT_ENCODER):
            staged.wait(tensor.name)
    kept = _kept(source, header)
    quantizer.quantize(partial, preset.file_type, importance, kept, progress, staged.go_on_to)
    staged.go_on_to("")
    if staged.unread:
        raise BackendError(
            "this llama.cpp does not report what it reads; install llama-cpp-python 0.3.36, or export the model as "
            "a GGUF first and quantize that"
        )


def _kept(source: Path, header: GGUFHeader) -> dict[str, int]:
    """Tensors that keep their type: latent encoders folded for their norm, lost under f16 scales."""
    folded = {}
    ranks = {tensor.name: tensor.dims[0] for tensor in header.tensors if "attn_kv_a_norm" in tensor.name}
    for tensor in header.tensors:
        rank = ranks.get(tensor.name.replace("attn_kv_a_mqa", "attn_kv_a_norm"))
        whole = tensor.ggml_type in ("F32", "BF16")
        if rank and whole and tensor.name not in ranks and is_folded(_stored(source, tensor).rows(0, rank)):
            folded[tensor.name] = int(gguf.GGMLQuantizationType[tensor.ggml_type])
    return folded


def _compare(
    source: Path,
    header: GGUFHeader,
    output: Path,
    preset: Preset,
    importance: Mapping[str, Array],
    n_threads: int,
    progress: Progress,
) -> list[TensorReport]:
    quantized = {tensor.name: tensor for tensor in read_header(output).tensors}
    changed = [t for t in header.tensors if t.ggml_type != quantized[t.name].ggml_type]

    def report(before: TensorInfo) -> TensorReport:
        after = quantized[before.name]
        try:
            stored = _stored(source, before), _stored(output, after)
            error = relative_error(*stored, importance.get(before.name))
        except NotImplementedError:
            error = None
        return TensorReport(
            name=before.name,
            shape=before.dims[::-1],
            before=before.ggml_type,
            after=after.ggml_type,
            nbytes_before=before.nbytes,
            nbytes_after=after.nbytes,
            fell_back=fell_back(preset, before.dims[0], after.ggml_type),
            error=error,
        )

    reports = []
    with ThreadPoolExecutor(n_threads) as pool:  # NumPy releases the GIL while it computes
        for done, found in enumerate(pool.map(report, changed), start=1):
            reports.append(found)
            progress(len(changed) + done, 2 * len(changed))
    return reports


def _stored(path: Path, tensor: TensorInfo) -> StoredTensor:
    """A tensor in a memory map of its own, which is freed with it."""
    rows = int(np.prod(tensor.dims[1:]))
    data = np.memmap(path, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))
    return StoredTensor(data, tensor.ggml_type, tensor.dims[0], int(np.prod(tensor.dims[2:])))
