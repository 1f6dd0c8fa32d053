"""Conversations with a model, whose engine runs in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.open import Kind
from edgekv.chat.generate import Generator, Step
from edgekv.chat.sampling import Sampler, SamplingParams
from edgekv.chat.session import ChatSession, Event, PromptFormat
from edgekv.workflows.request import Request

__all__ = ["Chat", "ChatRequest", "SamplingParams", "open_chat"]


@dataclass(frozen=True)
class ChatRequest(Request):
    """A conversation to open.

    Attributes:
        model: a GGUF file, or a folder that `edgekv export onnx` wrote.
        backend: by default the one that reads the model's format.
        ctx_size: tokens of context; by default the trained length, but at most 4096.
        cache_type: how their keys and values are stored, such as "q8_0", or "q8_0/q4_0" for keys and values; by
            default f16 in llama.cpp.
        threads: by default the big physical cores.
        system: the system prompt.
        template: whether to use the model's chat template.
        max_tokens: most tokens of an answer; by default as many as the context holds.
        stop: texts before which an answer ends.
    """

    model: Path
    backend: Kind | None = None
    ctx_size: int | None = None
    cache_type: str | None = None
    threads: int | None = None
    system: str = ""
    template: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """An open conversation. `engine` has its memory figures, `session` its messages."""

    engine: IsolatedBackend
    session: ChatSession
    has_template: bool

    def ask(self, question: str) -> Iterator[Event]:
        """Answer a question; each Step has the `text` that is new, the last one the `timings` of the answer.

        Raises:
            InputError: the question alone does not fit the context.
            ModelFileError: the chat template refused.
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
        InputError: an option is impossible, the file is malformed or unsupported, or does not fit in memory.
        BackendError: the engine is not installed or failed.
    """
    sampler = Sampler(request.sampling)  # refuses impossible settings before the engine starts
    engine = IsolatedBackend(
        request.model,
        request.backend,
        n_ctx=request.ctx_size,
        cache_type=request.cache_type,
        n_threads=request.threads,
    )
    try:
        language = engine.language()
        prompt_format = (
            PromptFormat.of_model(language, str(request.model), "go on without it with --no-template")
            if request.template
            else PromptFormat(language, None)
        )
        session = ChatSession(
            Generator(engine, language, engine.interrupt),
            prompt_format,
            sampler,
            system=request.system,
            max_tokens=request.max_tokens,
            stop=request.stop,
        )
        yield Chat(engine, session, prompt_format.has_template)
    finally:
        engine.close()
