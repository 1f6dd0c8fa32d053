"""Calibration text of a conversion: from files, or written by the model, or both."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.errors import BackendError, InputError, UnsupportedError
from edgekv.export.gguf.write import write_gguf
from edgekv.progress import Progress, Stages
from edgekv.source import TensorSource
from edgekv.text.self_written import AT_ONCE, Writer, reference_writer, self_written
from edgekv.text.windows import windows_from_files
from edgekv.tokenizer.language import opening_tokens
from edgekv.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgekv.workflows.convert import ConvertRequest

CACHE_NBYTES = 384 << 20  # of all sequences that are written side by side
ENGINE_WEIGHTS = "q8_0"  # small, quick in every build of llama.cpp, and hardly another model


def calibration_windows(
    source: TensorSource, request: ConvertRequest, n_tokens: int, written: int, folder: Path, progress: Stages
) -> NDArray[np.int64]:
    """Calibration windows: of the request's text, or of text that the model writes, in windows of `written` tokens.

    Raises:
        InputError: a text is not readable or too short, or `n_tokens` is not positive.
    """
    if n_tokens < 1:
        raise InputError("--text-tokens takes a positive number")
    if request.text:
        tokenizer = Tokenizer.from_metadata(source.metadata)
        return windows_from_files(list(request.text), tokenizer, n_tokens, request.seed)
    return written_windows(source, n_tokens, written, request.seed, folder, progress)


def written_windows(
    source: TensorSource, n_tokens: int, length: int, seed: int, folder: Path, progress: Stages
) -> NDArray[np.int64]:
    """Token windows (n, length), none longer than the model was trained for, that the model writes itself.

    llama.cpp writes them where it is installed and runs the model, else the NumPy reference: the same text for the
    same seed and engine. `folder` holds a copy of the model meanwhile.
    """
    length = min(length, source.spec.context_length)
    shape = max(1, n_tokens // length), length
    if importlib.util.find_spec("llama_cpp"):
        copy = folder / "writer.gguf"
        try:
            write_gguf(source, copy, ENGINE_WEIGHTS, {}, True, progress("preparing the model to write text"))
            writing = progress("writing calibration text")
            quantizer = Quantizer(copy)
            return _written(source, quantizer.sample, "f16", shape, seed, writing, quantizer.n_threads)
        except (BackendError, UnsupportedError):
            pass  # built for another processor, or a model that only the reference runs
        finally:
            copy.unlink(missing_ok=True)
    writing = progress("writing calibration text without llama.cpp")
    return _written(source, reference_writer(source), "f32", shape, seed, writing)


def _written(
    source: TensorSource,
    writer: Writer,
    cache_type: str,
    shape: tuple[int, int],
    seed: int,
    progress: Progress,
    n_cores: int = 1,
) -> NDArray[np.int64]:
    nbytes = source.spec.kv_bytes_per_token(cache_type) * shape[1]
    halves = -(-shape[0] // 2)  # two batches at least, so that little text is written on two cores too
    at_once = max(1, min(AT_ONCE, halves, CACHE_NBYTES // nbytes))
    n_workers = max(1, min(n_cores, CACHE_NBYTES // (nbytes * at_once)))
    tokenizer = readable_tokenizer(source)
    opening = opening_tokens(tokenizer) if tokenizer else []
    return self_written(
        writer, source.metadata, source.spec.vocab, opening, shape, seed, progress, at_once, n_workers
    )


def readable_tokenizer(source: TensorSource) -> Tokenizer | None:
    """The model's tokenizer; None where there is none that EdgeKV reads."""
    try:
        return Tokenizer.from_metadata(source.metadata)
    except InputError:
        return None


def mixed(given: NDArray[np.int64], written: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Half of the given windows and all of the written ones, in a random order: the last ones are held out."""
    windows = np.concatenate([given[: -(-len(given) // 2)], written])
    return np.asarray(np.random.default_rng(seed).permutation(windows))
