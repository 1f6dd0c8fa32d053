"""A model's chat template, which is untrusted code, rendered within limits.

Templates run in jinja2's ImmutableSandboxedEnvironment (without it, a template in a GGUF ran any Python:
CVE-2024-34359). The sandbox bounds neither time nor memory, so this module does: by a deadline that is
checked on every line that runs, a ceiling for memory, a longest output, and a largest integer.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from edgekv.errors import ModelFileError

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 4 * 2**20
MAX_ERROR_CHARS = 500
MAX_MEMORY_NBYTES = 64 * 2**20  # bounds a single long C call too, which the deadline cannot interrupt
TIMEOUT_S = 5.0
MAX_INTEGER_BITS = 64


class ChatTemplate:
    """A compiled template.

    Raises:
        ModelFileError: it is no template, or too large.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str, timeout_s: float = TIMEOUT_S) -> None:
        import jinja2

        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFileError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are allowed"
            )
        self._timeout_s = timeout_s
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # Compiling needs limits too: jinja2 computes constant expressions then.
        with self._limits("compile"):
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                raise ModelFileError(f"the chat template is not valid jinja2: {_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the assistant's answer starts.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} in order.

        Raises:
            ModelFileError: the template refused these messages, failed, or went past a limit.
        """
        parts: list[str] = []
        size = 0
        with self._limits("render"):
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,  # transformers always passes these two, and templates rely on it
                documents=None,
                **self._tokens,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT_CHARS:
                    raise ModelFileError(f"the chat template wrote more than {MAX_OUTPUT_CHARS} characters")
        return "".join(parts)

    @contextlib.contextmanager
    def _limits(self, action: str) -> Iterator[None]:
        try:
            with _deadline(self._timeout_s), _memory_ceiling():
                yield
        except _TimeIsUp:
            raise ModelFileError(f"the chat template took over {self._timeout_s:g} s to {action}") from None
        except MemoryError:
            raise ModelFileError(
                f"the chat template took over {MAX_MEMORY_NBYTES >> 20} MiB to {action}"
            ) from None
        except RecursionError:
            raise ModelFileError(f"the chat template is nested too deeply to {action}") from None
        except ModelFileError:
            raise
        except _TemplateRefusal as error:
            raise ModelFileError(f"the model's chat template says: {_line(error)}") from error
        except Exception as error:  # a filter may raise anything when it meets another type than it expects
            raise ModelFileError(
                f"the chat template failed: {type(error).__name__}: {_line(error)}"
            ) from error


class _TemplateRefusal(Exception):
    """The template called raise_exception."""


class _TimeIsUp(BaseException):
    """Not an Exception: no handler inside jinja2 may swallow it."""


def _environment() -> Any:
    """The environment that templates of the transformers library expect (utils/chat_template_utils.py)."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the assistant's text for training and changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox without huge integers, one product of which outlasts any deadline, and without repeated
        lists, whose text is far longer than they are."""

        intercepted_binops = frozenset({"*", "**", "%", "+", "-", "//"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and isinstance(right, int) and abs(right) > MAX_INTEGER_BITS:
                raise ValueError("an exponent is too large")
            for value in (left, right):
                if operator == "*" and isinstance(value, list | tuple):
                    raise ValueError("lists cannot be multiplied here")
                if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
                    raise ValueError("a number is too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", Generation],
    )
    environment.globals.pop("lipsum", None)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter with the arguments, and their order, of the transformers library."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _line(error: Exception) -> str:
    """An error's words in one short line, without control characters: the template may have written them."""
    words = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)[:MAX_ERROR_CHARS]


def _refuse(message: str) -> None:
    raise _TemplateRefusal(message)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp after this many seconds, at the next line of Python that the block runs."""
    end = time.monotonic() + seconds

    def check(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise _TimeIsUp
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _memory_ceiling() -> Iterator[None]:
    """Let allocations fail once the process has grown by MAX_MEMORY_NBYTES (on Linux only)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = pages * resource.getpagesize() + MAX_MEMORY_NBYTES
    if soft != resource.RLIM_INFINITY:
        ceiling = min(ceiling, soft)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
