"""Bodies of requests as OpenAI's API has them, checked when they are read, and what the engine is to do for them.

A field that is not listed here is refused. Fields that change nothing here are accepted and unused; those that would
change the answer in a way that the engine does not offer are accepted at their neutral value alone.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from edgekv.errors import InputError

MAX_SCHEMA_CHARS = 64 * 1024
MAX_DEPTH = 64  # of a JSON schema
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Top = Annotated[int, msgspec.Meta(ge=0, le=20)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
_NEUTRAL: tuple[Any, ...] = (None, 0, "", [], {}, False)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message: only text."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message; what clients send back of an answer may be there, but empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None

    def plain(self) -> dict[str, str]:
        """The role and content that chat templates know."""
        for name in ("tool_calls", "function_call", "audio"):
            _require_neutral(self, name)
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content or ""}


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """The `json_schema` of a response format; it is always strict."""

    name: str = ""
    schema: dict[str, Any] | bool = True
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None
    user: Any = None
    packs: Annotated[list[Text], msgspec.Meta(max_length=16)] | None = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ("frequency_penalty", "presence_penalty", "logit_bias")

    def wanted(self) -> dict[str, Any]:
        """Arguments of edgekv.serve.engine.scheduler.Scheduler.start that both kinds of body give.

        Raises:
            InputError: it asks for what the engine does not offer.
        """
        if self.n not in (None, 1):
            raise InputError(f"n is {self.n}; one answer is given per request, so send it several times")
        for name in self.UNSUPPORTED:
            _require_neutral(self, name)
        names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "repeat_last_n")
        sampling = {name: value for name in names if (value := getattr(self, name)) is not None}
        if sampling.get("top_p") == 0:  # only the likeliest token is left
            sampling |= {"top_p": 1.0, "temperature": 0.0}
        if self.seed is not None:
            sampling["seed"] = self.seed % 2**64
        format = self.response_format
        return {
            "sampling": sampling,
            "packs": self.packs or [],
            "max_tokens": self.max_tokens,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "json_object": format is not None and format.type == "json_object",
            "schema": None if format is None or format.type != "json_schema" else _schema_text(format),
        }

    @property
    def include_usage(self) -> bool:
        """Whether the last event of a stream tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        *Body.UNSUPPORTED,
        "tools",
        "functions",
        "audio",
        "prediction",
        "web_search_options",
    )

    def job(self) -> dict[str, Any]:
        """Arguments of edgekv.serve.engine.scheduler.Scheduler.start; raises as `wanted` does."""
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true; set it too")
        wanted = self.wanted()
        wanted["max_tokens"] = self.max_completion_tokens or self.max_tokens
        return {
            **wanted,
            "messages": [message.plain() for message in self.messages],
            "text": None,
            "tokens": None,
            "top_logprobs": self.top_logprobs or 0 if self.logprobs else None,
        }


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: str | list[int | str | list[int]]
    logprobs: Top | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (*Body.UNSUPPORTED, "echo", "suffix")

    DEFAULT_MAX_TOKENS = 16  # OpenAI's

    def job(self) -> dict[str, Any]:
        """Arguments of edgekv.serve.engine.scheduler.Scheduler.start; raises as `wanted` does."""
        if self.best_of not in (None, 1):
            raise InputError(f"best_of is {self.best_of}; one answer is given per request")
        wanted = self.wanted()
        prompt: Any = self.prompt
        if isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt):
            if len(prompt) > 1:
                raise InputError(
                    f"there are {len(prompt)} prompts, or tokens among them; send one per request"
                )
            (prompt,) = prompt
        return {
            **wanted,
            "max_tokens": self.max_tokens or self.DEFAULT_MAX_TOKENS,
            "messages": None,
            "text": prompt if isinstance(prompt, str) else None,
            "tokens": None if isinstance(prompt, str) else prompt,
            "top_logprobs": self.logprobs,
        }


def _require_neutral(body: msgspec.Struct, name: str) -> None:
    if getattr(body, name) not in _NEUTRAL:
        raise InputError(f"{name} is not supported; leave it out")


def _schema_text(format: ResponseFormat) -> str:
    if format.json_schema is None:
        raise InputError("response_format of type json_schema needs a json_schema; give one")
    schema = format.json_schema.schema
    if _depth(schema) > MAX_DEPTH:
        raise InputError(f"the JSON schema is nested more than {MAX_DEPTH} deep; simplify it")
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InputError(f"the JSON schema takes {len(text)} characters; at most {MAX_SCHEMA_CHARS} are read")
    return text


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, at most one past MAX_DEPTH."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [child for each in inner if isinstance(each, list) for child in each]
        depth += 1
    return depth
