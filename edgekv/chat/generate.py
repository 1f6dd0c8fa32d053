"""The one token loop: prompt in, tokens with text and timings out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekv.backends.base import Backend, Interrupted
from edgekv.chat.sampling import Sampler
from edgekv.tokenizer.language import Language, TokenStream

# stop: a stop token or string; length: max_tokens; context: the cache is full; interrupted: by interrupt().
Finish = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Counts and seconds of one generation so far; the caller's own time between tokens is not in them."""

    n_reused: int = 0  # prompt tokens found in the cache
    n_prefilled: int = 0  # prompt tokens run through the model
    n_generated: int = 0  # tokens sampled, the stop token included
    ttft_s: float = 0.0  # from the call to the first sampled token
    prefill_s: float = 0.0
    decode_s: float = 0.0  # from the first sampled token to the last

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens a second; 0 if none were run."""
        return self.n_prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens a second after the first; 0 if there was at most one."""
        return (self.n_generated - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Step:
    """One turn of the loop. The last one has a `finish`, and no token if it was interrupted."""

    token: int | None
    text: str  # what this token makes final; "" while a character or a possible stop string is incomplete
    timings: Timings
    finish: Finish | None = None


class AnswerText:
    """Text of a stream of tokens up to a stop string, which never shows even in part."""

    def __init__(self, tokenizer: Language, stop: Collection[str] = ()) -> None:
        self._stream = TokenStream(tokenizer)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is final after this token; sets `stopped` once a stop string is complete."""
        return self._release(self._stream.push(token))

    def finish(self) -> str:
        """The rest, when no token will follow."""
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

    What the cache shares with the next prompt from its start on is kept; the rest is trimmed away and
    prefilled. Nothing in the cache is ever shifted.

    Args:
        interrupt_backend: what ends a backend's call in progress, where the engine can be told to.
    """

    def __init__(
        self, backend: Backend, tokenizer: Language, interrupt_backend: Callable[[], None] | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._interrupt_backend = interrupt_backend
        self._interrupted = False
        self._cached: list[int] = []  # its first backend.n_past tokens are in the cache

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
    ) -> Iterator[Step]:
        """Continue a prompt; the last step has a `finish`.

        Args:
            prompt: at least one token.
            max_tokens: by default as many as the cache has room for.
            text: goes on with this text; by default a new one without stop strings. When the cache is full,
                what it holds back stays in it, so that a caller can make room and go on.
            stop_ids: tokens that end the text and are not part of it; by default the tokenizer's.

        Raises:
            BackendError: the prompt does not fit the cache, or the engine failed.
        """
        self._interrupted = False
        text = AnswerText(self.tokenizer) if text is None else text
        stop_ids = self.tokenizer.stop_ids if stop_ids is None else stop_ids
        started = time.perf_counter()
        n_reused = self._reuse(prompt)
        timings = Timings(n_reused=n_reused, n_prefilled=len(prompt) - n_reused)
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
        """Trim the cache to what the prompt starts with; at least the last token stays to be run."""
        held = self._cached[: self.backend.n_past]
        shared = 0
        for ours, theirs in zip(held, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        self.backend.trim(shared)
        return shared

    def _step(
        self,
        token: int,
        text: AnswerText,
        timings: Timings,
        stop_ids: Collection[int],
        max_tokens: int | None,
    ) -> Step:
        """What a sampled token means."""
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
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
