"""A conversation: its turns, the prompt that they make, and what is dropped when the context is full."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from edgekv.backends.base import Backend
from edgekv.chat.generate import AnswerText, Finish, Forgotten, Generator, Step, Timings
from edgekv.chat.pieces import PieceEncoder, token_name
from edgekv.chat.sampling import Sampler
from edgekv.chat.template import ChatTemplate
from edgekv.errors import InputError, ModelFileError
from edgekv.tokenizer.language import Language, opening_tokens

PRIVATE_USE = (
    0xF0000  # supplementary private use area A: its characters stand for the names of control tokens
)
DOCUMENTS = "\U00100000"  # of area B: stands for the tokens of documents


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Dropped:
    """The oldest turns were dropped because the context was full."""

    n_turns: int


Event = Step | Dropped | Forgotten


class PromptFormat:
    """Turns a conversation into tokens, by the model's chat template or else by joining its texts.

    Attributes:
        documents: tokens that the system message begins with, whatever its text; without a template the prompt does.
    """

    def __init__(
        self, tokenizer: Language, template: ChatTemplate | None, where: str = "", remedy: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._where, self._remedy = where, remedy
        self._pieces = PieceEncoder(tokenizer)
        self._bos = opening_tokens(tokenizer)
        self.documents: Sequence[int] = ()

    @classmethod
    def of_model(cls, tokenizer: Language, where: str = "", remedy: str = "") -> PromptFormat:
        """The format of the model's chat template, if it has one.

        Args:
            where: what errors of the template begin with, such as the model's path.
            remedy: what they end with.

        Raises:
            ModelFileError: the template is broken.
        """
        if tokenizer.chat_template is None:
            return cls(tokenizer, None)
        bos, eos = token_name(tokenizer, tokenizer.bos_id), token_name(tokenizer, tokenizer.eos_id)
        with _template_errors(where, remedy):
            return cls(tokenizer, ChatTemplate(tokenizer.chat_template, bos, eos), where, remedy)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def tokens(self, system: str, turns: Sequence[Turn], question: str) -> list[int]:
        """The prompt that asks `question` after the turns.

        Only the template can write control tokens: a message that contains "<|im_end|>" is text.

        Raises:
            ModelFileError: the template refused or failed.
        """
        if self._template is None:
            text = system + "".join(turn.question + turn.answer for turn in turns) + question
            return [*self._bos, *self.documents, *self._tokenizer.encode(text)]
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        return self.of_messages(messages, self.documents)

    def of_messages(self, messages: Sequence[Mapping[str, str]], documents: Sequence[int] = ()) -> list[int]:
        """The prompt that asks for the assistant's next message, of {"role": ..., "content": ...} in order.

        Args:
            documents: tokens that the system message begins with, which is made if the first one is none.

        Raises:
            InputError: the model has no chat template.
            ModelFileError: the template refused or failed.
        """
        if self._template is None:
            raise InputError("this model has no chat template; send its prompt as text")
        written = [dict(message) for message in messages]
        stand_ins = self._hide_control_names(written)
        if not documents:
            return self._encode(self._render(written), stand_ins)
        if written[0]["role"] != "system":
            written.insert(0, {"role": "system", "content": ""})
        written[0]["content"] = DOCUMENTS + written[0]["content"]
        before, after = self._around_documents(written)
        return [
            *self._encode(before, stand_ins),
            *documents,
            *self._encode(after, stand_ins, goes_on=True),
        ]

    def before_documents(self) -> list[int]:
        """The tokens of every prompt in front of its documents.

        Raises:
            ModelFileError: the template refused or failed, or leaves the system message out.
        """
        if self._template is None:
            return list(self._bos)
        messages = [{"role": "system", "content": DOCUMENTS}, {"role": "user", "content": "?"}]
        return self._encode(self._around_documents(messages)[0], {})

    def around_question(self) -> tuple[list[int], list[int]]:
        """The tokens of a first prompt in front of its question, and those behind it.

        Raises:
            ModelFileError: the template refused or failed, or leaves the question out.
        """
        if self._template is None:
            return list(self._bos), []
        before, found, after = self._render([{"role": "user", "content": DOCUMENTS}]).partition(DOCUMENTS)
        if not found:
            with _template_errors(self._where, self._remedy):
                raise ModelFileError("the chat template drops the user's message")
        return self._encode(before, {}), self._encode(after, {}, goes_on=True)

    def _around_documents(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        """The text in front of the documents, and that behind them."""
        before, found, after = self._render(messages).partition(DOCUMENTS)
        if not found:
            with _template_errors(self._where, "leave the template out with --no-template"):
                raise ModelFileError(
                    "the chat template has no place for documents: it drops the system message"
                )
        return before, after

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        assert self._template is not None
        with _template_errors(self._where, self._remedy):
            return self._template.render(messages)

    def _encode(self, text: str, stand_ins: Mapping[str, str], goes_on: bool = False) -> list[int]:
        """Tokens of a rendered text; one that does not go on from another begins with the opening tokens."""
        spelled = bool(self._bos) and text.startswith(token_name(self._tokenizer, self._bos[0]))
        tokens = [] if goes_on or spelled else list(self._bos)
        for part in re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]:
            if part in stand_ins:
                tokens += self._tokenizer.encode(stand_ins[part])
            else:
                tokens += self._pieces.encode(part)
        return tokens

    def _hide_control_names(self, messages: list[dict[str, str]]) -> dict[str, str]:
        """Replace the names of control tokens in the messages; returns {stand-in character: name}."""
        stand_ins: dict[str, str] = {}
        for message in messages:
            for name in self._pieces.control_names(message["content"]):
                if name not in stand_ins.values():
                    stand_ins[chr(PRIVATE_USE + len(stand_ins))] = name
        for stand_in, name in stand_ins.items():
            for message in messages:
                message["content"] = message["content"].replace(name, stand_in)
        return stand_ins


@contextmanager
def _template_errors(where: str, remedy: str) -> Iterator[None]:
    """Errors of a chat template with its model in front and a remedy behind."""
    try:
        yield
    except ModelFileError as error:
        parts = (f"{where}: " if where else "", str(error), f"; {remedy}" if remedy else "")
        raise ModelFileError("".join(parts)) from error


class ChatSession:
    """One conversation with one model.

    When the context is full, the oldest turns are dropped until half of it is free, but never the system
    prompt. The remaining turns must then be prefilled again, so this should happen rarely.

    Attributes:
        system: the system prompt, "" for none (templates may have their own default).
        turns: the turns that are remembered.
        unanswered: the last question, if its answer failed or was stopped before its first token.
        on_answer: called after each answer, once its turn is remembered.
    """

    def __init__(
        self,
        generator: Generator,
        prompt_format: PromptFormat,
        sampler: Sampler,
        *,
        system: str = "",
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.generator = generator
        self.system = system
        self.turns: list[Turn] = []
        self.unanswered: str | None = None
        self.on_answer: Callable[[], None] = lambda: None
        self._format = prompt_format
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._stop = stop

    def clear(self) -> None:
        """Forget all turns, not the system prompt."""
        self.turns.clear()
        self.unanswered = None

    def regenerate(self) -> Iterator[Event]:
        """Answer the last question again.

        Raises:
            InputError: there was none.
        """
        if self.unanswered is None and not self.turns:
            raise InputError("there is no answer yet to repeat; ask something first")
        question = self.unanswered if self.unanswered is not None else self.turns.pop().question
        return self.ask(question)

    def ask(self, question: str) -> Iterator[Event]:
        """Answer a question; the turn is remembered once the last step is out.

        Raises:
            InputError: the question alone does not fit the context.
            ModelFileError: the chat template refused.
            BackendError: the engine failed; `unanswered` holds the question.
        """
        self.unanswered = question
        text = AnswerText(self.generator.tokenizer, self._stop)
        answer: list[int] = []
        said: list[str] = []
        done = Timings()
        n_ctx = self.generator.backend.n_ctx
        limit = n_ctx - n_ctx // 8  # room for an answer: turns are better dropped before it than within it
        finish: Finish | None = None
        while finish is None:
            prompt, n_dropped = self._fit(question, len(answer), limit)
            if n_dropped:
                yield Dropped(n_dropped)
            left = None if self._max_tokens is None else self._max_tokens - len(answer)
            before = done
            for step in self.generator.generate(prompt + answer, self._sampler, max_tokens=left, text=text):
                if isinstance(step, Forgotten):
                    yield step
                    continue
                finish, done = step.finish, _sum(before, step.timings)
                if step.token is not None:
                    answer.append(step.token)
                new = step.text
                if finish == "context":
                    if self._can_make_room(question, len(answer)):
                        finish = None
                    else:
                        new += text.finish()
                said.append(new)
                yield replace(step, text=new, timings=done, finish=finish)
            limit = n_ctx - 1
        if finish != "interrupted" or "".join(said):
            self.turns.append(Turn(question, "".join(said)))
            self.unanswered = None
        self.on_answer()

    def _can_make_room(self, question: str, n_answer: int) -> bool:
        bare = self._format.tokens(self.system, [], question)
        return bool(self.turns) and len(bare) + n_answer < self.generator.backend.n_ctx

    def _fit(self, question: str, n_answer: int, limit: int) -> tuple[list[int], int]:
        """The prompt, and the number of turns dropped to keep it and the answer within `limit` tokens."""
        n_ctx = self.generator.backend.n_ctx
        prompt = self._format.tokens(self.system, self.turns, question)
        if len(prompt) + n_answer <= limit:
            return prompt, 0
        bare = self._format.tokens(self.system, [], question)
        if len(bare) + n_answer > n_ctx:
            raise InputError(
                f"this message takes {len(bare)} tokens and the context holds {n_ctx}; shorten it, or "
                f"{more_context(self.generator.backend)}"
            )

        def is_enough(n: int) -> bool:
            rest = self._format.tokens(self.system, self.turns[n:], question)
            return len(rest) + n_answer <= n_ctx // 2

        n_turns = len(self.turns)  # the more are dropped, the shorter the prompt
        n_dropped = bisect_left(range(n_turns), True, lo=min(1, n_turns), key=is_enough)
        del self.turns[:n_dropped]
        return self._format.tokens(self.system, self.turns, question), n_dropped


def more_context(backend: Backend) -> str:
    """The advice where a context is full."""
    if backend.n_ctx_train is not None and backend.n_ctx >= backend.n_ctx_train:
        return f"take a model that was trained for more than {backend.n_ctx_train} tokens"
    return "restart with a larger --ctx-size"


def _sum(first: Timings, then: Timings) -> Timings:
    """Timings of an answer that was generated in two parts."""
    return Timings(
        n_reused=first.n_reused + then.n_reused,
        n_prefilled=first.n_prefilled + then.n_prefilled,
        n_forgotten=first.n_forgotten + then.n_forgotten,
        n_generated=first.n_generated + then.n_generated,
        ttft_s=first.ttft_s or then.ttft_s,
        prefill_s=first.prefill_s + then.prefill_s,
        decode_s=first.decode_s + then.decode_s,
    )
