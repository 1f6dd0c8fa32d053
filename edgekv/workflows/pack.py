"""Packs: documents that are prefilled once, and what it loses to put several behind each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.open import Kind
from edgekv.cache.rows import row_nbytes
from edgekv.chat.packs import HEADS, Pack, document_tokens, place_packs, read_pack, write_pack
from edgekv.errors import InputError
from edgekv.files import check_output
from edgekv.progress import Stages, silent
from edgekv.reference.ops import kl_rows, log_softmax
from edgekv.source import Array
from edgekv.text.files import read_text
from edgekv.workflows.chat import prompt_format_of, stored_cache_type
from edgekv.workflows.request import Request

QUESTION = "Sum up the documents above."


@dataclass(frozen=True)
class PackRequest(Request):
    """Documents to prefill.

    Attributes:
        documents: text files, one behind the other in the pack.
        ctx_size: tokens of context; by default enough for any text of their length.
        cache_type: how the cache is stored, for the chats that will take the pack; by default f16 in llama.cpp.
        template: whether the model's chat template stands around the documents.
    """

    documents: tuple[Path, ...]
    model: Path
    output: Path
    backend: Kind | None = None
    ctx_size: int | None = None
    cache_type: str | None = None
    threads: int | None = None
    template: bool = True
    force: bool = False


@dataclass(frozen=True)
class PackResult:
    """A pack that was written.

    Attributes:
        n_tokens: of the documents, as the model reads them.
        rows_nbytes: what they take in the engine's cache.
        nbytes: of the file.
        movable: whether it can stand behind other packs.
    """

    output: Path
    n_tokens: int
    rows_nbytes: int
    nbytes: int
    movable: bool


@dataclass(frozen=True)
class CheckPacksRequest(Request):
    """Packs to compare, one behind the other, with one prefill of the same tokens.

    Attributes:
        question: asked behind the documents.
        max_tokens: of the answer that is compared.
        heads: how many first tokens of each later pack are computed anew, one measurement each.
    """

    packs: tuple[Path, ...]
    model: Path
    backend: Kind | None = None
    ctx_size: int | None = None
    threads: int | None = None
    template: bool = True
    question: str = QUESTION
    max_tokens: int = 64
    heads: tuple[int, ...] = (0, HEADS)


@dataclass(frozen=True)
class PlacedLoss:
    """Packs behind each other against one prefill.

    Attributes:
        heads: first tokens of each later pack that were computed anew.
        kl: mean KL(prefill || packs) over the answer, in nats per token, and its largest value.
        same: share of the answer's tokens that the packs' likeliest are too.
        first_token_s: from nothing cached to the first token's logits.
    """

    heads: int
    kl: float
    kl_max: float
    same: float
    first_token_s: float


@dataclass(frozen=True)
class PackCheck:
    """What `check_packs` measured. `first_token_s` is that of the prefill."""

    n_documents: int
    n_prompt: int
    n_answer: int
    first_token_s: float
    losses: tuple[PlacedLoss, ...]


def pack_documents(request: PackRequest, progress: Stages = silent) -> PackResult:
    """Prefill documents once and write what the engine cached of them.

        edgekv.pack_documents(edgekv.PackRequest((text,), small, "text.pack", cache_type="q8_0"))

    Raises:
        InputError: a document cannot be read, they do not fit the context, or the model cannot be opened.
        UnsupportedError: the engine cannot save this model's cache.
        OutputError: the output exists without `force`, or cannot be written.
        BackendError: the engine is not installed or failed.
    """
    check_output(request.output, request.force)
    if not request.documents:
        raise InputError("there is nothing to pack; name at least one text file")
    texts = [read_text(path) for path in request.documents]
    n_ctx = request.ctx_size or sum(len(text.encode()) for text in texts) // 2 + 512
    with ExitStack() as stack:
        engine = stack.enter_context(_opened(request, n_ctx, request.cache_type))
        language = engine.language()
        before = prompt_format_of(language, request.model, request.template).before_documents()
        documents = document_tokens(language, texts)
        n_tokens = len(before) + len(documents)
        if n_tokens > engine.n_ctx and request.ctx_size:
            raise InputError(f"the documents take {n_tokens} tokens; pass --ctx-size {n_tokens} or more")
        if n_tokens > engine.n_ctx:  # a text of which every other byte is a token
            stack.close()
            engine = stack.enter_context(_opened(request, n_tokens, request.cache_type))
        model, names = engine.identity(), [path.name for path in request.documents]
        nbytes = write_pack(
            request.output, engine, model, before, documents, names,
            force=request.force, progress=progress("prefilling"),
        )  # fmt: skip
        rows_nbytes = n_tokens * row_nbytes(engine.layout())
        return PackResult(request.output, len(documents), rows_nbytes, nbytes, model.is_latent)


@contextmanager
def _opened(
    request: PackRequest | CheckPacksRequest, n_ctx: int, cache_type: str | None
) -> Iterator[IsolatedBackend]:
    engine = IsolatedBackend(
        request.model, request.backend, n_ctx=n_ctx, cache_type=cache_type, n_threads=request.threads
    )
    try:
        yield engine
    finally:
        engine.close()


def check_packs(request: CheckPacksRequest, progress: Stages = silent) -> PackCheck:
    """Measure what is lost by packs behind each other, against one prefill of the whole.

        edgekv.pack_documents(edgekv.PackRequest((text,), small, "text.pack"))
        edgekv.check_packs(edgekv.CheckPacksRequest(("text.pack",), small, max_tokens=8)).losses

    The prefill's own likeliest answer is what both predict.

    Raises:
        InputError: a pack is damaged or of another model, or they do not fit the context.
        UnsupportedError: they cannot be moved.
        BackendError: the engine is not installed or failed.
    """
    packs = [read_pack(path) for path in request.packs]
    if not packs:
        raise InputError("there is nothing to check; name the packs")
    documents = [token for pack in packs for token in pack.documents]
    cache_type = stored_cache_type(packs[0].stored.header.layout, request.model, request.backend)
    with _opened(request, request.ctx_size or len(documents) + 1024, cache_type) as engine:
        prompt_format = prompt_format_of(engine.language(), request.model, request.template)
        prompt_format.documents = documents
        prompt = prompt_format.tokens("", [], request.question)
        report = progress("comparing")
        report(0, 1 + len(request.heads))
        started = time.perf_counter()
        first = engine.prefill(prompt)
        first_token_s = time.perf_counter() - started
        answer, wanted = _answer(engine, first, request.max_tokens)
        losses = []
        for i, heads in enumerate(request.heads, 1):
            report(i, 1 + len(request.heads))
            losses.append(
                _loss(engine, packs, prompt_format.before_documents(), prompt, answer, wanted, heads)
            )
        report(1 + len(request.heads), 1 + len(request.heads))
    return PackCheck(len(documents), len(prompt), len(answer), first_token_s, tuple(losses))


def _answer(engine: IsolatedBackend, logits: Array, n_tokens: int) -> tuple[list[int], Array]:
    """The likeliest answer, and log-probabilities (n_tokens, vocab) before each of its tokens."""
    answer, rows = [int(logits.argmax())], [log_softmax(logits)]
    while len(answer) < n_tokens and engine.n_past < engine.n_ctx:
        logits = engine.decode(answer[-1])
        rows.append(log_softmax(logits))
        answer.append(int(logits.argmax()))
    return answer, np.stack(rows)


def _loss(
    engine: IsolatedBackend,
    packs: Sequence[Pack],
    before: Sequence[int],
    prompt: Sequence[int],
    answer: Sequence[int],
    wanted: Array,
    heads: int,
) -> PlacedLoss:
    engine.trim(0)
    model = engine.identity()
    started = time.perf_counter()
    placed = place_packs(engine, model, packs, before, heads)
    assert placed == prompt[: len(placed)]
    rows = [log_softmax(engine.prefill(prompt[len(placed) :]))]
    first_token_s = time.perf_counter() - started
    rows += [log_softmax(engine.decode(token)) for token in answer[:-1]]
    given = np.stack(rows)
    kl = kl_rows(wanted, given)
    same = float((given.argmax(-1) == np.array(answer)).mean())
    return PlacedLoss(heads, float(kl.mean()), float(kl.max()), same, first_token_s)
