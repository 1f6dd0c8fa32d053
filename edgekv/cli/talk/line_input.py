"""Input of messages at a terminal: line editing, history, messages of several lines, pasted text."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_state_path

CONTINUED = ". "
HISTORY_LENGTH = 1000
PASTE_GAP_S = 0.02  # the next line of a paste comes sooner; nobody types that fast


def history_path() -> Path:
    """The file of the history."""
    return user_state_path("edgekv") / "chat_history"


class MessageReader:
    """Reads messages, with line editing and history where Python has readline.

    A message is one line, unless that ends with a backslash, or starts with \\"\\"\\" (the message then ends
    with the line that ends with it), or is pasted: readline 8.1 and later reads a bracketed paste as one
    line, and otherwise lines that follow without a pause belong to the same message.
    """

    def __init__(self, history: Path) -> None:
        self._history = history
        self._readline = None
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            readline.set_auto_history(False)
            with contextlib.suppress(OSError):
                readline.read_history_file(history)
            readline.set_history_length(HISTORY_LENGTH)

    def read(self, prompt: str) -> str:
        """The next message.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: Ctrl-C; the text typed so far is dropped.
        """
        message = assemble(input, prompt, _more_is_waiting)
        if message.strip():
            self._remember(message)
        return message

    def _remember(self, message: str) -> None:
        """Add a message to the history and its file, which only its owner may read."""
        if self._readline is None:
            return
        # Chatting goes on with a read-only home, and in a locale that lacks a letter.
        with contextlib.suppress(OSError, UnicodeError):
            self._readline.add_history(message)
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            self._readline.write_history_file(self._history)


def assemble(read_line: Callable[[str], str], prompt: str, more: Callable[[], bool]) -> str:
    """One message, joined from lines; `more` returns whether the next line is waiting already."""
    line = read_line(prompt)
    if line.lstrip().startswith('"""'):
        text = line.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + read_line(CONTINUED)
        return text.rstrip()[:-3].strip("\n")
    while line.endswith("\\") or more():
        line = line[:-1] + "\n" if line.endswith("\\") else line + "\n"
        line += read_line(CONTINUED)
    return line


def _more_is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_GAP_S)[0])
