"""The functions that open a model in an engine; the engines themselves are imported when they are opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, get_args

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

    from edgekv.backends.base import Backend, EvictableBackend
    from edgekv.backends.llama_cpp.sequences import LlamaSequences
    from edgekv.backends.sequences import OneSequence
    from edgekv.cache.policies.base import Need
    from edgekv.cache.policies.settings import Eviction
    from edgekv.models.identity import ModelIdentity
    from edgekv.tokenizer.language import Language

Kind = Literal["llama.cpp", "onnx", "reference"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def open_backend(
    path: Path,
    kind: Kind | None = None,
    *,
    n_ctx: int | None = None,
    cache_type: str | None = None,
    n_threads: int | None = None,
    eviction: Eviction | None = None,
    abort_flag: ctypes.Array[ctypes.c_char] | None = None,
) -> Backend:
    """Open a model in an engine, in this process.

    Args:
        path: a model file, or for onnx a folder that `edgekv export onnx` wrote.
        kind: "llama.cpp", "onnx", or "reference" for the NumPy reference; by default onnx for such a folder,
            the reference for an .edgekv file, else llama.cpp.
        n_ctx: tokens that the cache can hold; by default the trained length, but at most 4096. With an `eviction`,
            tokens that may come, of which the cache holds fewer; by default the trained length.
        cache_type: number format of the cache: by default f16 in llama.cpp, which takes one for K and V or
            two, as in q8_0/q4_0; the reference has only f32, an ONNX folder only what it was exported with.
        n_threads: by default one per physical big core; the reference uses NumPy's own threads.
        eviction: which rows leave a cache of fixed size.
        abort_flag: two bytes; a call in progress ends with Interrupted when the first is set. The reference
            ignores it.

    Raises:
        InputError: an option is impossible, or the file is malformed or unsupported.
        UnsupportedError: the engine cannot evict by this policy.
        BackendError: the engine is not installed or failed.
    """
    options: EngineOptions = {"cache_type": cache_type, "n_threads": n_threads, "abort_flag": abort_flag}
    if eviction is None:
        return _open(path, kind or default_kind(path), n_ctx, options)
    from edgekv.backends.evicting import EvictingBackend
    from edgekv.cache.policies.named import policy_named
    from edgekv.cache.policies.settings import require_possible

    require_possible(eviction)
    needs = policy_named(eviction.policy).needs
    backend = _open(path, kind or default_kind(path), eviction.n_cells, options, needs)
    try:
        return EvictingBackend(backend, eviction, n_ctx)
    except BaseException:
        backend.close()
        raise


class EngineOptions(TypedDict):
    """Arguments of `open_backend` that go to an engine as they are."""

    cache_type: str | None
    n_threads: int | None
    abort_flag: ctypes.Array[ctypes.c_char] | None


def _open(
    path: Path, kind: Kind, n_ctx: int | None, options: EngineOptions, needs: frozenset[Need] = frozenset()
) -> EvictableBackend:
    from edgekv.errors import InputError

    if kind == "onnx":
        from edgekv.backends.onnxruntime import OnnxBackend

        return OnnxBackend(path, n_ctx=n_ctx, **options)
    if default_kind(path) == "onnx":
        raise InputError(f"{path} is an ONNX folder, which {kind} cannot open; leave out --backend {kind}")
    if kind == "llama.cpp":
        if default_kind(path) == "reference":
            raise InputError(
                f"{path} has no graph in llama.cpp; run `edgekv export onnx` on it, or leave out --backend"
            )
        from edgekv.backends.llama_cpp.backend import LlamaCppBackend

        cache_type = options["cache_type"] or default_cache_type(path, kind)
        return LlamaCppBackend(
            path,
            n_ctx=n_ctx,
            cache_type=cache_type,
            n_threads=options["n_threads"],
            abort_flag=options["abort_flag"],
            shows=needs,
        )
    if kind != "reference":
        raise InputError(f"unknown backend {kind!r}; there are {', '.join(KINDS)}")
    if options["cache_type"] not in (None, "f32"):
        raise InputError(
            f"the reference backend caches in f32, not {options['cache_type']}; use --backend llama.cpp"
        )
    if options["n_threads"] is not None:
        raise InputError("the reference backend's threads are NumPy's: set OMP_NUM_THREADS instead")
    from edgekv.backends.base import DEFAULT_N_CTX
    from edgekv.backends.reference import ReferenceBackend
    from edgekv.models.open import open_model

    source = open_model(path)
    return ReferenceBackend(source, n_ctx or min(source.spec.context_length, DEFAULT_N_CTX))


def open_sequences(
    path: Path,
    kind: Kind | None = None,
    *,
    n_parallel: int = 1,
    n_ctx: int | None = None,
    cache_type: str | None = None,
    n_threads: int | None = None,
    eviction: Eviction | None = None,
) -> LlamaSequences | OneSequence:
    """Open a model for several sequences side by side, in this process; arguments and errors are `open_backend`'s.

    Args:
        n_parallel: sequences side by side; engines other than llama.cpp have one.
        n_ctx: tokens that one sequence may hold.
    """
    from edgekv.backends.sequences import OneSequence
    from edgekv.errors import InputError

    kind = kind or default_kind(path)
    if kind == "llama.cpp" and default_kind(path) == kind and eviction is None:
        from edgekv.backends.llama_cpp.sequences import LlamaSequences

        cache_type = cache_type or default_cache_type(path, kind)
        return LlamaSequences(path, n_parallel, n_ctx=n_ctx, cache_type=cache_type, n_threads=n_threads)
    if n_parallel > 1 and eviction is not None:
        raise InputError("a cache that evicts holds one request at a time; take --parallel 1, or no --budget")
    if n_parallel > 1:
        raise InputError(f"{kind} answers one request at a time; take --parallel 1, or a GGUF in llama.cpp")
    backend = open_backend(
        path, kind, n_ctx=n_ctx, cache_type=cache_type, n_threads=n_threads, eviction=eviction
    )
    return OneSequence(backend, open_language(backend, path), can_trim=eviction is None)


def open_language(backend: Backend, path: Path) -> Language:
    """The vocabulary of an opened model: llama.cpp's own copy, or for other engines read from the file.

    Raises:
        ModelFileError: the file's vocabulary is unusable.
        UnsupportedError: EdgeKV cannot read this kind of vocabulary.
    """
    if backend.name == "llama.cpp":
        from edgekv.backends.llama_cpp.backend import LlamaCppBackend

        engine = getattr(backend, "backend", backend)  # of one that evicts
        assert isinstance(engine, LlamaCppBackend)
        return engine.language()
    from edgekv.models.gguf.header import read_header
    from edgekv.models.onnx.folder import language_file
    from edgekv.tokenizer.tokenizer import Tokenizer

    return Tokenizer.from_metadata(read_header(language_file(path)).metadata)


def default_kind(path: Path) -> Kind:
    """The engine for a model: onnx for an ONNX folder, the reference for an .edgekv file, else llama.cpp."""
    from edgekv.models.gguf.own import SUFFIX
    from edgekv.models.onnx.folder import is_onnx_folder

    if path.suffix == SUFFIX:
        return "reference"
    return "onnx" if is_onnx_folder(path) else "llama.cpp"


def cache_type_name(path: Path, kind: Kind, wanted: str | None) -> str:
    """The one name of the cache type that an engine is asked for, by default its own.

    Raises:
        InputError: llama.cpp has no such type.
        ModelFileError: an ONNX folder's manifest is malformed.
    """
    from edgekv.backends.base import require_cache_format

    if wanted is None:
        return default_cache_type(path, kind)
    return str(require_cache_format(wanted)) if kind == "llama.cpp" else wanted


def default_cache_type(path: Path, kind: Kind) -> str:
    """The number format of a model's cache in an engine that was told none.

    Raises:
        ModelFileError: an ONNX folder's manifest is malformed.
    """
    if kind == "onnx":
        from edgekv.models.onnx.manifest import read_manifest

        return read_manifest(path).model.cache_type
    return "f16" if kind == "llama.cpp" else "f32"


def model_identity(path: Path) -> ModelIdentity:
    """Which model this is: the same for a GGUF and for the ONNX folder that was exported from it.

    Raises:
        ModelFileError: a file is malformed.
    """
    from edgekv.models.identity import ModelIdentity, gguf_identity

    if default_kind(path) != "onnx":
        return gguf_identity(path)
    from edgekv.models.onnx.folder import DATA
    from edgekv.models.onnx.manifest import check_folder

    manifest = check_folder(path)
    return manifest.source or ModelIdentity(manifest.model.name, manifest.files[DATA].sha256)
