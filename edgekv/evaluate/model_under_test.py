"""Model under test: a model file, the engine that runs it, its cache type and the format of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from edgekv import __version__
from edgekv.backends.base import Backend
from edgekv.backends.llama_cpp.kernel.load import chosen_kernel
from edgekv.backends.open import Kind, cache_type_name, open_backend
from edgekv.cache.policies.settings import Eviction
from edgekv.documents import dumps
from edgekv.errors import InputError, ModelFileError
from edgekv.files import file_sha256
from edgekv.models.gguf.header import kept_header
from edgekv.models.gguf.parts import require_first
from edgekv.models.onnx.folder import MANIFEST, is_onnx_folder, language_file
from edgekv.models.onnx.manifest import read_manifest
from edgekv.progress import ignore
from edgekv.quant.formats import FORMATS, KEEP
from edgekv.tokenizer.tokenizer import Tokenizer

Weights = Literal["keep", "bf16", "f16", "f32"]
ENGINE_PACKAGES = {"llama.cpp": "llama-cpp-python", "onnx": "onnxruntime"}


@dataclass(frozen=True)
class ModelUnderTest:
    """A model as it is run.

    `cache_type` None is the engine's default. `weights` other than "keep" are dequantized first: llama.cpp
    multiplies quantized weights by activations rounded to 8 bits, which by itself costs as much as a q8_0 cache.
    """

    path: Path
    backend: Kind = "llama.cpp"
    cache_type: str | None = None
    weights: Weights = KEEP
    eviction: Eviction | None = None  # which rows leave a cache of fixed size

    @property
    def cache(self) -> str:
        """The cache type by its one name, the engine's default spelt out.

        Raises:
            InputError: llama.cpp has no such type.
        """
        return cache_type_name(self.path, self.backend, self.cache_type)

    @property
    def recorded_weights(self) -> str:
        """The weights in journals and reports, which have their own word for `keep`."""
        return "stored" if self.weights == KEEP else self.weights

    def identity(self) -> dict[str, str | int | None]:
        """Everything that decides the figures measured of it; part of its journals' names."""
        evicting = {"eviction": dumps(self.eviction)} if self.eviction else {}
        return {
            "model": model_sha256(self.path),
            "backend": self.backend,
            "cache": self.cache,
            "weights": self.recorded_weights,
            "engine": engine_version(self.backend),
            **evicting,
        }


@contextmanager
def open_engine(subject: ModelUnderTest, n_ctx: int, folder: Path, n_threads: int) -> Iterator[Backend]:
    """The subject in its engine, closed at the end; a copy with other weights is kept in `folder`.

    Raises:
        InputError: an option is impossible, or the file is malformed or unsupported.
        BackendError: the engine is not installed or failed.
    """
    path = engine_path(subject, folder)
    # NumPy's threads are set by edgekv.evaluate.workers, before BLAS is loaded.
    threads = n_threads if subject.backend != "reference" else None
    backend = open_backend(
        path,
        subject.backend,
        n_ctx=n_ctx,
        cache_type=subject.cache_type,
        n_threads=threads,
        eviction=subject.eviction,
    )
    try:
        yield backend
    finally:
        backend.close()


def cache_nbytes_per_token(subject: ModelUnderTest, folder: Path) -> float:
    """Bytes that the engine allocates per token, all layers together; raises as `open_engine` does."""
    n_ctx = 256  # llama.cpp's smallest
    with open_engine(replace(subject, eviction=None), n_ctx, folder, 1) as backend:
        return backend.cache_nbytes() / backend.n_ctx


def engine_version(kind: Kind) -> str:
    """Version of the engine, and whether EdgeKV's attention kernel is in it; the reference's is EdgeKV's own."""
    if kind not in ENGINE_PACKAGES:
        return __version__
    try:
        found = version(ENGINE_PACKAGES[kind])
    except PackageNotFoundError:
        return "not installed"
    return f"{found} with EdgeKV's kernel" if kind == "llama.cpp" and chosen_kernel() == "edgekv" else found


def model_sha256(path: Path) -> str:
    """SHA-256 of a model: of its file, or of an ONNX folder's manifest, which lists the SHA-256 of all its files.

    Raises:
        InputError: it cannot be read.
    """
    return file_sha256(path / MANIFEST if is_onnx_folder(path) else path)


def read_tokenizer(path: Path) -> Tokenizer:
    """The model's tokenizer."""
    metadata = kept_header(language_file(path)).metadata
    require_first(metadata, path)
    return Tokenizer.from_metadata(metadata)


def trained_context(path: Path) -> int:
    """Tokens that the model was trained for.

    Raises:
        ModelFileError: the file is malformed, or names no context length.
    """
    if is_onnx_folder(path):
        return read_manifest(path).model.context_length
    length = kept_header(path).trained_context
    if length is None:
        raise ModelFileError(f"{path} names no context length; give one with --ctx-size")
    return length


def beyond_training(path: Path, length: int) -> str | None:
    """The note on contexts of this many tokens, if the model was trained for fewer."""
    with contextlib.suppress(ModelFileError):  # a file that does not say
        if length > (trained := trained_context(path)):
            return f"note: measured up to {length} tokens, trained for {trained}"
    return None


def require_same_tokens(path: Path, reference: Path) -> None:
    """Raise InputError unless both models have the same tokens; KL between them means nothing otherwise."""
    tokens, others = (
        kept_header(language_file(p)).metadata.get("tokenizer.ggml.tokens") for p in (path, reference)
    )
    if tokens != others:
        raise InputError(
            f"{path} and {reference} have different vocabularies; --against takes the model that the other was "
            "made from"
        )


def engine_path(subject: ModelUnderTest, folder: Path) -> Path:
    """The file that the engine opens: the model, or its copy with f16 or f32 weights, made here if it is missing."""
    if subject.weights == KEEP:
        return subject.path
    if is_onnx_folder(subject.path):
        raise InputError(
            f"{subject.path} runs with the weights it was exported with; leave out --weights {subject.weights}"
        )
    from edgekv.export.gguf.write import write_gguf
    from edgekv.models.open import open_model

    path = folder / f"weights-{file_sha256(subject.path)[:16]}-{subject.weights}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(open_model(subject.path), path, subject.weights, {}, False, ignore)
    return path


def weights_nbytes(subject: ModelUnderTest) -> int:
    """Bytes of the weights in the engine, roughly."""
    if is_onnx_folder(subject.path):
        return read_manifest(subject.path).model.weights_nbytes
    tensors = kept_header(subject.path).tensors
    kept = "f32" if subject.backend == "reference" else subject.weights
    if kept == KEEP:
        return sum(tensor.nbytes for tensor in tensors)
    return sum(FORMATS[kept].nbytes(math.prod(tensor.dims)) for tensor in tensors)
