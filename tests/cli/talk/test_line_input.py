"""Messages of several lines."""

from collections.abc import Callable, Iterator

import pytest

from edgekv.cli.talk.line_input import assemble, history_path


def reader(lines: list[str]) -> Callable[[str], str]:
    rest: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        for line in rest:
            return line
        raise EOFError

    return read


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""', "def f():", "    return 1", '"""'], "def f():\n    return 1"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""all in one"""'], "all in one"),
        (['"""', "a \\", '"""'], "a \\"),
        ([""], ""),
    ],
)
def test_blocks(lines: list[str], message: str) -> None:
    assert assemble(reader(lines), "> ", lambda: False) == message


def test_lines_that_are_there_at_once_are_one_paste() -> None:
    waiting = [True, True, False]
    assert assemble(reader(["a", "b", "c", "d"]), "> ", lambda: waiting.pop(0)) == "a\nb\nc"


def test_an_open_block_at_the_end_of_the_input() -> None:
    with pytest.raises(EOFError):
        assemble(reader(['"""', "a"]), "> ", lambda: False)


def test_history_lives_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert str(history_path()) == "/state/edgekv/chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(history_path()) == "/home/me/.local/state/edgekv/chat_history"
