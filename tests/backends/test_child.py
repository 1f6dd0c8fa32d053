"""Child processes of every fate: what they answer, and what is said of their death."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekv.backends.isolated.child import Child, cause_of_death
from edgekv.errors import BackendError, OutputError

ACTIONS = """
import os, sys, time
from edgekv.backends.isolated.child import Parent
from edgekv.errors import OutputError


class Actions:
    def echo(self, value): return value
    def stray(self): os.write(1, b"not a line of JSON\\n"); print("nor this", flush=True); return "clean"
    def full(self): raise OutputError("the disk is full; free some space")
    def odd(self): return 1 / 0
    def count(self, n):
        for i in range(n):
            parent.send({"done": i + 1, "total": n})
        return n
    def wait(self): parent.send({"wait": "a"}); return parent.receive()["go"]
    def leave(self, code): print("first", "second", "", "third", sep="\\n", file=sys.stderr, flush=True); os._exit(code)
    def half(self): os.write(parent._lines.fileno(), b'{"ok": '); os._exit(3)
    def sleep(self): time.sleep(60)
    def session(self): return os.getsid(0)


parent = Parent()
parent.serve(Actions())
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    (tmp_path / "actions_of_a_child.py").write_text(ACTIONS)
    paths = (str(tmp_path), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    with Child("actions_of_a_child", out_of_memory="close other programs") as child:
        yield child


def test_answers_and_stray_prints(child: Child) -> None:
    for value in (None, 1.5, "naïve 🙂\ud800\n\0", {"a": [1, 2]}, "x" * 200_000):
        assert child.ask("echo", value=value) == value
    assert child.ask("stray") == "clean"
    assert child.ask("session") == child.pid  # out of reach of the terminal's Ctrl-C


def test_errors_keep_their_class_and_end_nothing(child: Child) -> None:
    with pytest.raises(OutputError, match="disk is full"):
        child.ask("full")
    with pytest.raises(BackendError, match="the engine failed: ZeroDivisionError"):
        child.ask("odd")
    assert child.ask("echo", value=1) == 1


def test_messages_before_the_answer(child: Child) -> None:
    heard: list[dict[str, Any]] = []
    assert child.ask("count", heard.append, n=3) == 3
    assert [message["done"] for message in heard] == [1, 2, 3]
    assert child.ask("wait", lambda message: child.send({"go": message["wait"] * 2})) == "aa"


def test_what_cuts_a_wait_short_ends_the_child(child: Child) -> None:
    def refuse(message: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.ask("count", refuse, n=3)
    assert not child.alive
    with pytest.raises(BackendError, match="the engine's process is closed"):
        child.ask("echo", value=1)
    child.close()


@pytest.mark.parametrize("code", [0, 7])
def test_a_child_that_leaves_is_told_with_its_last_words(child: Child, code: int) -> None:
    for _ in range(2):
        with pytest.raises(BackendError, match=rf"died: exit code {code} \[second; third\]"):
            child.ask("leave", code=code)
    assert not child.alive


def test_half_an_answer_is_none(child: Child) -> None:
    with pytest.raises(BackendError, match="exit code 3"):
        child.ask("half")


def test_a_child_killed_while_it_works(child: Child) -> None:
    threading.Timer(0.3, os.kill, (child.pid, signal.SIGKILL)).start()
    with pytest.raises(BackendError, match="killed by SIGKILL; if memory ran out, close other programs"):
        child.ask("sleep")


def test_close_does_not_wait_for_the_work(child: Child) -> None:
    child.send({"do": "sleep"})
    started = time.perf_counter()
    child.close()
    assert time.perf_counter() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_module_that_cannot_start_is_told() -> None:
    child = Child("no_such_module", out_of_memory="", who="llama.cpp's process")
    with (
        child,
        pytest.raises(BackendError, match=r"llama.cpp's process died: .*No module named no_such_module\]"),
    ):
        child.ask("echo", value=1)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "a worker died: exit code 1"),
        (-signal.SIGKILL, "a worker died: killed by SIGKILL; if memory ran out, take fewer --jobs"),
        (-signal.SIGTERM, "a worker died: killed by SIGTERM"),
        (-signal.SIGSEGV, "a worker died: killed by SIGSEGV; please report the model"),
        (-60, "a worker died: killed by signal 60"),
    ],
)
def test_causes_of_death(code: int, words: str) -> None:
    assert cause_of_death("a worker", code, "take fewer --jobs") == words


def test_an_illegal_instruction_comes_with_its_remedy() -> None:
    cause = cause_of_death("the engine's process", -signal.SIGILL, "")
    assert "illegal instruction" in cause
    assert "GGML_NATIVE=OFF" in cause
