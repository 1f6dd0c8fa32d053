"""Answers in the form of OpenAI's API, whole or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any

from edgekv.serve.engine_process import Event


class Form(ABC):
    """What one answer looks like; `add` takes the engine's events in order."""

    OBJECT: str
    CHUNK: str
    PREFIX: str

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.PREFIX}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._reused = 0
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._n_chars = 0

    def add(self, event: Event) -> dict[str, Any] | None:
        """Note an event; its chunk, if there is something new in it."""
        self._usage["prompt_tokens"] += event.get("n_prompt", 0)
        self._usage["completion_tokens"] += event.get("n_generated", 0)
        self._reused = event.get("n_reused", self._reused)
        if "text" not in event or not (event["text"] or event.get("logprobs") or "finish" in event):
            return None
        chunk = self._head | {"object": self.CHUNK, "choices": [self._choice(event)]}
        self._texts.append(event["text"])
        self._logprobs += event.get("logprobs", [])
        self._n_chars += len(event["text"])
        return chunk

    def whole(self, finish: str) -> dict[str, Any]:
        """The answer after its last event."""
        with_logprobs = {"logprobs": self._logprobs} if self._logprobs else {}
        self._n_chars = 0
        event = {"text": "".join(self._texts), "finish": finish, **with_logprobs}
        return self._head | {
            "object": self.OBJECT,
            "choices": [self._choice(event, whole=True)],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """Tokens; those of the prompt that were found in the cache beside them."""
        total = sum(self._usage.values())
        return {
            **self._usage,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self._reused},
        }

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last one, if the client asked for it."""
        return self._head | {"object": self.CHUNK, "choices": [], "usage": self.usage()}

    @abstractmethod
    def first_chunk(self) -> dict[str, Any] | None:
        """What a stream begins with."""

    @abstractmethod
    def _choice(self, event: Event, whole: bool = False) -> dict[str, Any]:
        """The one choice of a chunk, or of the answer."""


class ChatForm(Form):
    """/v1/chat/completions."""

    OBJECT, CHUNK, PREFIX = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first_chunk(self) -> dict[str, Any] | None:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._head | {"object": self.CHUNK, "choices": [choice]}

    def _choice(self, event: Event, whole: bool = False) -> dict[str, Any]:
        if whole:
            said = {"message": {"role": "assistant", "content": event["text"], "refusal": None}}
        else:
            said = {"delta": {"content": event["text"]} if event["text"] else {}}
        logprobs = (
            {"content": [_chat_logprob(*each) for each in event["logprobs"]]}
            if event.get("logprobs")
            else None
        )
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": event.get("finish")}


class CompletionForm(Form):
    """/v1/completions."""

    OBJECT, CHUNK, PREFIX = "text_completion", "text_completion", "cmpl"

    def first_chunk(self) -> dict[str, Any] | None:
        return None

    def _choice(self, event: Event, whole: bool = False) -> dict[str, Any]:
        logprobs = self._listed(event["logprobs"]) if event.get("logprobs") else None
        return {"index": 0, "text": event["text"], "logprobs": logprobs, "finish_reason": event.get("finish")}

    def _listed(self, logprobs: list[Any]) -> dict[str, Any]:
        """The old form: one list per field. Offsets count characters of the tokens."""
        tokens = [_text(name) for (name, _), _ in logprobs]
        offsets, at = [], self._n_chars
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [value for (_, value), _ in logprobs],
            "top_logprobs": [{_text(name): value for name, value in top} for _, top in logprobs],
            "text_offset": offsets,
        }


def _chat_logprob(token: tuple[str, float], top: list[tuple[str, float]]) -> dict[str, Any]:
    return {**_named(*token), "top_logprobs": [_named(*each) for each in top]}


def _named(name: str, value: float) -> dict[str, Any]:
    return {"token": _text(name), "logprob": value, "bytes": list(name.encode("latin-1"))}


def _text(name: str) -> str:
    """The text of a token's bytes, which the engine sends as Latin-1."""
    return name.encode("latin-1").decode("utf-8", "replace")
