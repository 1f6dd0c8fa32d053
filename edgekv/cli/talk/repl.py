"""The Repl of `edgekv chat`: messages, commands, and recovery when the engine dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import click

from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.kernel_names import KERNEL_VARIABLE
from edgekv.chat.session import ChatSession, Event
from edgekv.cli.talk.answers import Answer, notice, show_answer, stats_line
from edgekv.cli.talk.line_input import MessageReader, history_path
from edgekv.errors import BackendError, InputError

HELP = """\
/regen          answer the last message again
/clear          forget the conversation, keep the system prompt
/system TEXT    set the system prompt (without TEXT: show it)
/stats          times, tokens/s and memory of the last answer
/exit           leave (or Ctrl-D)

A message of several lines: paste it, end each line with \\, or put it between two lines of \"\"\".
Ctrl-C stops an answer. A message that starts with / and is not a command: put a space before it."""


class Repl:
    """One conversation at a terminal."""

    def __init__(
        self, session: ChatSession, engine: IsolatedBackend, model_name: str, *, always_stats: bool
    ) -> None:
        self._session = session
        self._engine = engine
        self._always_stats = always_stats
        self._last: Answer | None = None
        self._reader = MessageReader(history_path())
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: click.echo(HELP),
            "/regen": lambda _: self._answer(self._session.regenerate),
            "/clear": self._clear,
            "/system": self._system,
            "/stats": self._stats,
        }
        click.echo(
            f"{model_name} in {engine.name}: {engine.n_ctx} tokens of context in "
            f"{engine.cache_nbytes() / 1e6:.1f} MB of cache. /help lists the commands, Ctrl-D leaves.",
            err=True,
        )

    def run(self) -> None:
        """Read and answer until /exit or the end of the input."""
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # background jobs of a shell start with it ignored
        while True:
            try:
                message = self._reader.read("> ")
            except KeyboardInterrupt:
                click.echo("\n[Ctrl-D or /exit leaves]", err=True)
                continue
            except EOFError:
                click.echo()
                return
            name, _, rest = message.strip().partition(" ")
            if message.startswith("/"):
                if name == "/exit":
                    return
                if name in self._commands:
                    self._commands[name](rest.strip())
                else:
                    click.echo(f"there is no {name}; /help lists the commands", err=True)
            elif message.strip():
                text = message.strip()
                self._answer(lambda text=text: self._session.ask(text))  # type: ignore[misc]

    def _answer(self, events: Callable[[], Iterator[Event]]) -> None:
        """Print an answer; an error ends the answer and not the conversation."""
        try:
            answer = show_answer(self._session, self._engine, events())
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            return
        except BackendError as error:
            self._recover(error)
            return
        except KeyboardInterrupt:  # before `show_answer` began to handle it
            notice("stopped")
            return
        self._last = answer
        if answer.step.finish == "interrupted":
            notice("stopped; /regen answers again")
        if self._always_stats:
            self._stats("")

    def _recover(self, error: BackendError) -> None:
        """Print the error; reopen a dead engine, which prefills the conversation at the next question."""
        click.echo(f"error: {error}", err=True)
        if not self._engine.alive:
            if self._engine.kernel == "edgekv":  # it may have been the kernel that died
                os.environ[KERNEL_VARIABLE] = "stock"
                notice("the attention kernel is left out from here on")
            self._engine.restart()
            notice("the engine was restarted and the conversation is kept; /regen asks again")

    def _clear(self, _: str) -> None:
        self._session.clear()
        notice("forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._session.system = text
        notice(f"system prompt: {self._session.system or 'none of yours'}")

    def _stats(self, _: str) -> None:
        if self._last is None:
            notice("no answer yet")
        else:
            click.echo(stats_line(self._last, self._engine), err=True)
