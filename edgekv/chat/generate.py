"""The token loop: prompt in, tokens with text and timings out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekv.backends.base import Backend, Interrupted
from edgekv.chat.sampling import Sampler
from edgekv.tokenizer.language import Language, TokenStream

# Why a generation ended: a stop token or string, max_tokens, a full cache, or interrupt().
Finish = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Counts and seconds of one generation so far, without the caller's own time between tokens."""

    n_reused: int = 0  # prompt tokens found in the cache
    n_prefilled: int = 0  # prompt tokens run through the model
    n_forgotten: int = 0  # of these, tokens that the cache had held and could not go back to
    n_generated: int = 0  # tokens sampled, the stop token included
    ttft_s: float = 0.0  # from the call to the first sampled token
    prefill_s: float = 0.0
    decode_s: float = 0.0  # from the first sampled token to the last

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second; 0 if none were run."""
        return self.n_prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first token; 0 if there was at most one."""
        return (self.n_generated - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Step:
    """One turn of the loop. Only the last one has a `finish`; if a call was interrupted, it has no token."""

    token: int | None
    text: str  # the text that this token completes; "" within a character or a possible stop string
    timings: Timings
    finish: Finish | None = None


@dataclass(frozen=True)
class Forgotten:
    """The prompt begins as the last one did, but the cache cannot go back that far: all of it is run anew."""

    n_tokens: int  # of the prompt
    n_shared: int  # that could have been reused


class AnswerText:
    """Text of a stream of tokens up to a stop string, of which no part is ever given out."""

    def __init__(self, tokenizer: Language, stop: Collection[str] = ()) -> None:
        self._stream = TokenStream(tokenizer)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token completes; sets `stopped` once a stop string is complete."""
        return self._release(self._stream.push(token))

    def finish(self) -> str:
        """The text that was held back, once no token will follow."""
        text = self._release(self._stream.finish())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Generator:
    """Generates on one backend, and knows which tokens its cache holds.

    The cache keeps the tokens that the next prompt starts with; the others are trimmed, and the rest of the
    prompt is prefilled. Nothing in the cache is ever shifted.

    Args:
        interrupt_backend: ends the backend's call in progress, for engines that can be interrupted.
    """

    def __init__(
        self, backend: Backend, tokenizer: Language, interrupt_backend: Callable[[], None] | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._interrupt_backend = interrupt_backend
        self._interrupted = False
        self._cached: list[int] = []  # its first backend.n_past tokens are in the cache

    @property
    def cached(self) -> list[int]:
        """The tokens in the cache."""
        return self._cached[: self.backend.n_past]

    def adopt(self, tokens: Sequence[int]) -> None:
        """Go on from tokens that somebody put into the backend's cache."""
        assert len(tokens) == self.backend.n_past
        self._cached = list(tokens)

    def interrupt(self) -> None:
        """End the generation in progress; safe in a signal handler and from another thread."""
        self._interrupted = True
        if self._interrupt_backend is not None:
            self._interrupt_backend()

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        text: AnswerText | None = None,
        stop_ids: Collection[int] | None = None,
    ) -> Iterator[Step | Forgotten]:
        """Continue a prompt; the last step has a `finish`. Forgotten comes first, if at all.

        Args:
            prompt: at least one token.
            max_tokens: by default as many as fit in the cache.
            text: takes the tokens; by default a new AnswerText without stop strings. When the cache is full,
                it keeps the text that it held back, so that the caller can make room and go on with it.
            stop_ids: tokens that end the text and are not part of it; by default the tokenizer's.

        Raises:
            BackendError: the prompt does not fit the cache, or the engine failed.
        """
        self._interrupted = False
        text = AnswerText(self.tokenizer) if text is None else text
        stop_ids = self.tokenizer.stop_ids if stop_ids is None else stop_ids
        started = time.perf_counter()
        n_shared = self._reuse(prompt)
        n_reused = self.backend.n_past
        timings = Timings(n_reused, len(prompt) - n_reused, n_shared - n_reused)
        if n_shared and not n_reused:
            yield Forgotten(len(prompt), n_shared)
        try:
            self._cached = list(prompt)
            logits = self.backend.prefill(prompt[n_reused:])
            prefilled = time.perf_counter()
            token = sampler.sample(logits, self._cached)
            ended = time.perf_counter()
            timings = replace(timings, n_generated=1, ttft_s=ended - started, prefill_s=prefilled - started)
            while True:
                step = self._step(token, text, timings, stop_ids, max_tokens)
                yield step
                if step.finish is not None:
                    return
                began = time.perf_counter()
                self._cached.append(token)
                token = sampler.sample(self.backend.decode(token), self._cached)
                decode_s = timings.decode_s + time.perf_counter() - began
                timings = replace(timings, n_generated=timings.n_generated + 1, decode_s=decode_s)
        except Interrupted:
            yield Step(None, text.finish(), timings, "interrupted")

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Trim the cache to the tokens that the prompt (but its last) starts with; returns how many these are."""
        pairs = zip(self._cached[: self.backend.n_past], prompt[:-1], strict=False)
        n_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.backend.trim(n_shared)
        return n_shared

    def _step(
        self,
        token: int,
        text: AnswerText,
        timings: Timings,
        stop_ids: Collection[int],
        max_tokens: int | None,
    ) -> Step:
        """The step of a sampled token."""
        if token in stop_ids:
            return Step(token, text.finish(), timings, "stop")
        new = text.push(token)
        if text.stopped:
            return Step(token, new, timings, "stop")
        if max_tokens is not None and timings.n_generated >= max_tokens:
            return Step(token, new + text.finish(), timings, "length")
        if self._interrupted:
            return Step(token, new + text.finish(), timings, "interrupted")
        if self.backend.n_past >= self.backend.n_ctx:
            return Step(token, new, timings, "context")
        return Step(token, new, timings)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
