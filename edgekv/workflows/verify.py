"""Verification: the same tokens through two models or two engines, and by how much their logits differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekv.backends.base import Backend
from edgekv.backends.open import Kind, default_kind, open_backend
from edgekv.errors import InputError
from edgekv.evaluate.model_under_test import read_tokenizer
from edgekv.evaluate.verify import Comparison, compare, sample_tokens
from edgekv.progress import Stages, silent
from edgekv.text.files import read_text
from edgekv.workflows.request import Request

TOKENS = 256
SEED = 1


@dataclass(frozen=True)
class VerifyRequest(Request):
    """Two models, or one in two engines.

    Attributes:
        b: by default `a` itself.
        backend_b: by default the one that reads B's format.
        cache_type: llama.cpp's, such as "q8_0", or "q8_0/q4_0" for K and V; the other engines have their own.
        text: a text file to compare on; by default A samples the tokens, of one model in two engines the second.
        text_tokens: tokens to compare on.
    """

    a: Path
    b: Path | None = None
    backend_a: Kind = "reference"
    backend_b: Kind | None = None
    cache_type: str = "f32"
    text: Path | None = None
    text_tokens: int = TOKENS


def verify_models(request: VerifyRequest, progress: Stages = silent) -> Comparison:
    """Run both on the same tokens and compare what they predict at every position.

        print(edgekv.verify_models(edgekv.VerifyRequest(small, text_tokens=32)).kl)

    Raises:
        InputError: fewer than 2 tokens, vocabularies that differ, or a model or text that cannot be read.
        BackendError: an engine is not installed or failed.
    """
    a, b, n_tokens = request.a, request.b or request.a, request.text_tokens
    if n_tokens < 2:
        raise InputError(f"--text-tokens takes a number of 2 or more; {TOKENS} is the default")
    engine_a = _open(a, request.backend_a, n_tokens, request.cache_type)
    try:
        engine_b = _open(b, request.backend_b, n_tokens, request.cache_type)
        try:
            if engine_a.n_vocab != engine_b.n_vocab:
                raise InputError(
                    f"the vocabularies differ: {a} has {engine_a.n_vocab} tokens, {b} has {engine_b.n_vocab}; "
                    "compare models of one family"
                )
            writer = engine_b if a == b else engine_a  # the first is the reference by default, which is slow
            given = (
                _read(request.text, a, n_tokens) if request.text else sample_tokens(writer, n_tokens, SEED)
            )
            return compare(engine_a, engine_b, given, progress("comparing"))
        finally:
            engine_b.close()
    finally:
        engine_a.close()


def _open(path: Path, backend: Kind | None, n_ctx: int, cache_type: str) -> Backend:
    backend = backend or default_kind(path)
    return open_backend(path, backend, n_ctx=n_ctx, cache_type=cache_type if backend == "llama.cpp" else None)


def _read(text: Path, model: Path, n_tokens: int) -> list[int]:
    ids = read_tokenizer(model).encode(read_text(text, "--text"))[:n_tokens]
    if len(ids) < 2:
        raise InputError(f"--text {text} holds {len(ids)} tokens, at least 2 are needed; give a longer text")
    return ids
