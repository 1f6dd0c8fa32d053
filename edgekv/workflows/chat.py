"""Conversations with a model, whose engine runs in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.backends.base import DEFAULT_N_CTX
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.open import Kind, default_kind
from edgekv.cache.policies.names import DEFAULT_POLICY, LayerBudgets
from edgekv.cache.policies.settings import wanted_eviction
from edgekv.cache.rows import Layout, cache_type_of
from edgekv.chat.generate import Generator, Step
from edgekv.chat.packs import Pack, place_packs, read_pack
from edgekv.chat.sampling import Sampler, SamplingParams
from edgekv.chat.saved import SavedSession, SessionKeeper, read_session
from edgekv.chat.session import ChatSession, Event, PromptFormat
from edgekv.errors import InputError, UnsupportedError
from edgekv.tokenizer.language import Language
from edgekv.workflows.request import Request

__all__ = ["Chat", "ChatRequest", "SamplingParams", "open_chat"]

ROOM_FOR_TALK = 1024  # tokens of context behind packs, where nobody asked for a size


@dataclass(frozen=True)
class ChatRequest(Request):
    """A conversation to open.

    Attributes:
        model: a GGUF file, or a folder that `edgekv export onnx` wrote.
        backend: by default the one that reads the model's format.
        ctx_size: tokens of context; by default the session's, or the trained length, but at most 4096.
        cache_type: how their keys and values are stored, such as "q8_0", or "q8_0/q4_0" for keys and values; by
            default as in the session or packs, or f16 in llama.cpp.
        threads: by default the big physical cores.
        budget: rows that the cache keeps; others are evicted, and `ctx_size` is by default the trained length.
        policy: which rows those are; edgekv.cache.policies.named.POLICIES.
        layers: how the budget is spread over layers, in engines where they may differ.
        system: the system prompt; by default the session's.
        template: whether to use the model's chat template.
        max_tokens: most tokens of an answer; by default as many as the context holds.
        stop: texts before which an answer ends.
        session: a file that keeps the conversation and its cache; it is made if it is not there.
        packs: files of `edgekv pack` whose documents the conversation begins with.
    """

    model: Path
    backend: Kind | None = None
    ctx_size: int | None = None
    cache_type: str | None = None
    threads: int | None = None
    budget: int | None = None
    policy: str = DEFAULT_POLICY
    layers: LayerBudgets = "uniform"
    system: str = ""
    template: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    session: Path | None = None
    packs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Chat:
    """An open conversation.

    Attributes:
        engine: has its memory figures.
        session: its messages.
        found: what session and packs brought, in words.
    """

    engine: IsolatedBackend
    session: ChatSession
    has_template: bool
    found: tuple[str, ...] = ()

    def ask(self, question: str) -> Iterator[Event]:
        """Answer a question; each Step has the `text` that is new, the last one the `timings` of the answer.

        Raises:
            InputError: the question alone does not fit the context.
            ModelFileError: the chat template refused.
            OutputError: the session cannot be saved.
            BackendError: the engine failed.
        """
        return self.session.ask(question)

    def answer(self, question: str) -> str:
        """The whole answer to a question; raises as `ask` does."""
        return "".join(event.text for event in self.ask(question) if isinstance(event, Step))


@contextmanager
def open_chat(request: ChatRequest) -> Iterator[Chat]:
    """Open a model for a conversation; the engine's process ends with the block.

        with edgekv.open_chat(edgekv.ChatRequest(model, cache_type="q4_0", max_tokens=50)) as chat:
            print(chat.answer("Why is the sky blue?"))

    Raises:
        InputError: an option is impossible, a file is malformed, unsupported or of another model, or the model does
            not fit in memory.
        BackendError: the engine is not installed or failed.
    """
    sampler = Sampler(request.sampling)  # refuses impossible settings before the engine starts
    if request.budget and request.packs:
        raise InputError(
            "packs bring rows of every token, which a budget would evict; leave --pack or --budget out"
        )
    saved = read_session(request.session) if request.session else None
    packs = [read_pack(path) for path in request.packs]
    stored = [saved.stored] if saved else [pack.stored for pack in packs]
    layout = stored[0].header.layout if stored else ()
    with ExitStack() as stack:
        engine = IsolatedBackend(
            request.model,
            request.backend,
            n_ctx=request.ctx_size or _found_ctx_size(saved, packs),
            cache_type=request.cache_type or stored_cache_type(layout, request.model, request.backend),
            n_threads=request.threads,
            eviction=wanted_eviction(request.budget, request.policy, request.layers),
        )
        stack.callback(engine.close)
        language = engine.language()
        prompt_format = prompt_format_of(language, request.model, request.template)
        session = ChatSession(
            Generator(engine, language, engine.interrupt),
            prompt_format,
            sampler,
            system=request.system,
            max_tokens=request.max_tokens,
            stop=request.stop,
        )
        found = []
        if packs:
            found.append(_begin_with(packs, saved, engine, session, prompt_format))
        if request.session:
            keeper, words = _keep(request.session, saved, engine, session, prompt_format)
            stack.callback(keeper.close)
            session.on_answer = keeper.save
            found.append(words)
        del saved, packs, stored  # and with them the files that they map
        yield Chat(engine, session, prompt_format.has_template, tuple(found))


def prompt_format_of(language: Language, model: Path, template: bool) -> PromptFormat:
    """How a model wants its prompts, or the texts alone without a template."""
    if not template:
        return PromptFormat(language, None)
    return PromptFormat.of_model(language, str(model), "go on without it with --no-template")


def _found_ctx_size(saved: SavedSession | None, packs: Sequence[Pack]) -> int | None:
    if saved is not None:
        return saved.notes.ctx_size
    n_packed = sum(len(pack.stored.tokens) for pack in packs)
    return max(n_packed + ROOM_FOR_TALK, DEFAULT_N_CTX) if packs else None


def stored_cache_type(layout: Layout, model: Path, backend: Kind | None) -> str | None:
    """The cache type of rows that are to be loaded, for the engine that has a choice."""
    kind = backend or default_kind(model)
    return cache_type_of(layout) if layout and kind == "llama.cpp" else None


def _begin_with(
    packs: Sequence[Pack],
    saved: SavedSession | None,
    engine: IsolatedBackend,
    session: ChatSession,
    prompt_format: PromptFormat,
) -> str:
    """Let a conversation begin with packs; returns what was done, in words."""
    documents = tuple(token for pack in packs for token in pack.documents)
    if (
        saved is not None
        and (saved.notes.documents or saved.notes.turns)
        and saved.notes.documents != documents
    ):
        raise InputError(
            "the session began with other documents; leave --pack out to go on with it, or name a new --session"
        )
    prompt_format.documents = documents
    before = prompt_format.before_documents()
    if saved is None or saved.stored.tokens[: len(before) + len(documents)] != [*before, *documents]:
        session.generator.adopt(place_packs(engine, engine.identity(), packs, before))
    names = ", ".join(pack.path.name for pack in packs)
    return f"{len(documents):,} tokens of {names} in the cache"


def _keep(
    path: Path,
    saved: SavedSession | None,
    engine: IsolatedBackend,
    session: ChatSession,
    prompt_format: PromptFormat,
) -> tuple[SessionKeeper, str]:
    """Keep a conversation in a file; what was found in it, in words, is returned too."""
    try:
        layout, words = engine.layout(), ""
    except UnsupportedError as error:
        layout, words = (), f"only the turns are kept: {error}"
    keeper = SessionKeeper(path, saved, engine.identity(), layout, session, prompt_format)
    summary = f"{path.name}: {saved.summary if saved else 'a new session'}"
    return keeper, "; ".join(filter(None, (summary, words)))
