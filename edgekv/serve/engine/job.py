"""One request in the engine: its prompt, its sampling, and the text that its tokens make."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekv.backends.sequences import Sequences
from edgekv.chat.generate import AnswerText
from edgekv.chat.sampling import Sampler, SamplingParams, largest
from edgekv.serve.engine.blocks import block_hashes
from edgekv.serve.engine.grammar import Grammar
from edgekv.serve.engine.packs import Chosen
from edgekv.serve.engine.prefixes import Prefixes, Rows
from edgekv.source import Array
from edgekv.tokenizer.language import Language

Logprob = tuple[str, float]  # a token's bytes as Latin-1, and ln p


@dataclass(frozen=True)
class Wanted:
    """What a request asks of its answer; the fields of the message that starts it.

    Attributes:
        max_tokens: most tokens of the answer; None for as many as fit.
        stop: texts before which it ends.
        top_logprobs: how many of the likeliest tokens to name with each one; None for no logprobs at all.
        schema: the JSON schema that the answer is to follow.
        said: the answer's first tokens, which another engine has given already.
    """

    sampling: dict[str, Any]
    max_tokens: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None
    schema: str | None
    said: tuple[int, ...] = ()


@dataclass(eq=False)
class Job:
    """A request that runs.

    Attributes:
        prompt: what is read before the first new token: the request's own, and what was said already.
        room: tokens that the context holds beside the request's own.
        feed: the last token, which the model has yet to read; nothing while the prompt is read.
    """

    id: int
    prompt: list[int]
    wanted: Wanted
    language: Language
    room: int
    grammar: Grammar | None
    rows: Rows
    blocks: list[bytes]
    n_reused: int = 0
    n_generated: int = 0
    finish: str | None = None
    feed: list[int] = field(default_factory=list)
    _pending: list[tuple[Logprob, list[Logprob]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sampler = Sampler(SamplingParams(**self.wanted.sampling))
        self._text = AnswerText(self.language, self.wanted.stop)
        self._seen = list(self.prompt)
        self.n_generated = len(self.wanted.said)
        for token in self.wanted.said:
            self._text.push(token)
            if self.grammar is not None:
                self.grammar.accept(token)

    @property
    def answering(self) -> bool:
        """Whether the prompt has been read."""
        return bool(self.feed)

    def accept(self, logits: Array) -> dict[str, Any]:
        """Sample the next token from logits (vocab,); the message of the text that it completes.

        Raises:
            InputError: the answer cannot go on by its schema.
        """
        allowed = logits if self.grammar is None else self.grammar.allowed(logits)
        token = self._sampler.sample(allowed, self._seen)
        self.n_generated += 1
        self._seen.append(token)
        self.feed = [token]
        if token in self.language.stop_ids:
            self.finish = "stop"
            return self._message(self._text.finish())
        if self.wanted.top_logprobs is not None:
            self._pending.append(self._logprobs(logits, token, self.wanted.top_logprobs))
        text = self._text.push(token)
        complete = self.grammar is not None and self.grammar.accept(token)
        if self._text.stopped or complete:
            self.finish = "stop"
        elif self.n_generated >= min(self.room, self.wanted.max_tokens or self.room):
            self.finish = "length"
        return self._message(text if self.finish is None else text + self._text.finish())

    def _message(self, text: str) -> dict[str, Any]:
        """Text and the logprobs of its tokens; those of text that is held back wait for it."""
        message: dict[str, Any] = {"id": self.id, "text": text, "token": self.feed[0]}
        if self.wanted.top_logprobs is not None and (text or self.finish):
            message["logprobs"], self._pending = self._pending, []
        if self.finish:
            message |= {"finish": self.finish, "n_generated": self.n_generated, "n_reused": self.n_reused}
        return message

    def _logprobs(self, logits: Array, token: int, count: int) -> tuple[Logprob, list[Logprob]]:
        """ln p of a token and of the likeliest ones, before any filter."""
        values = logits.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())

        def named(token: int) -> Logprob:
            return self.language.token_bytes(token).decode("latin-1"), float(values[token])

        return named(token), [named(int(other)) for other in largest(logits, count)] if count else []


def make_job(
    id: int,
    prompt: Sequence[int],
    wanted: Wanted,
    language: Language,
    engine: Sequences,
    grammar: Grammar | None,
    prefixes: Prefixes,
    packs: Chosen | None,
) -> Job:
    """A job whose rows begin with what the cache has of its prompt, or else with its packs.

    Raises:
        InputError: a setting of the sampling is out of its range, or packs cannot stand behind each other.
    """
    SamplingParams(**wanted.sampling)  # refuses before a sequence is taken
    origin = b"" if packs is None else packs.origin
    prompt = [*prompt, *wanted.said]
    blocks = block_hashes(prompt, origin=origin)
    rows = prefixes.begin(prompt, blocks, origin)
    if (
        packs is not None
        and len(rows.tokens) < len(placed := packs.tokens)
        and prompt[: len(placed)] == placed
    ):
        prefixes.place(rows, placed, functools.partial(packs.put, engine))
    room = engine.n_ctx - len(prompt) + len(wanted.said)
    job = Job(id, prompt, wanted, language, room, grammar, rows, blocks)
    job.n_reused = len(rows.tokens)
    return job
