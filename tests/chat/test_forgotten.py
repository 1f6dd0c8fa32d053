"""Conversations whose cache forgets what lies outside a window: the same tokens as anew, and a word about it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekv.backends.base import Backend
from edgekv.backends.open import open_backend
from edgekv.chat.generate import Forgotten, Generator, Step
from edgekv.chat.sampling import Sampler, SamplingParams
from edgekv.chat.session import ChatSession, Event, PromptFormat
from edgekv.cli.talk.answers import figures, show_answer, stats_line
from edgekv.models.gguf.header import read_header
from edgekv.tokenizer.tokenizer import Tokenizer

LONG = "a bad cab, a bed, " * 50  # 900 bytes; the window is 64 tokens, and 704 more stay in its cells


@pytest.fixture(scope="module")
def gemma(tiny_gemma: Path) -> Iterator[Backend]:
    backend = open_backend(tiny_gemma, n_ctx=2048, n_threads=1, cache_type="f32")
    yield backend
    backend.close()


@pytest.fixture
def generator(gemma: Backend, tiny_gemma: Path) -> Generator:
    gemma.trim(0)
    return Generator(gemma, Tokenizer.from_metadata(read_header(tiny_gemma).metadata))


def session(generator: Generator, max_tokens: int = 8) -> ChatSession:
    sampler = Sampler(SamplingParams(temperature=0))
    return ChatSession(generator, PromptFormat(generator.tokenizer, None), sampler, max_tokens=max_tokens)


def told(events: Iterator[Event]) -> tuple[list[int | None], list[Event], Step]:
    """Tokens, what came before the first of them, and the last step."""
    seen = list(events)
    steps = [event for event in seen if isinstance(event, Step)]
    return [step.token for step in steps], seen[: -len(steps)], steps[-1]


def test_small_steps_back_reuse_the_cache(generator: Generator) -> None:
    talk = session(generator)
    first, before, _ = told(talk.ask(LONG))
    again, notices, last = told(talk.regenerate())
    assert first == again
    assert before == notices == []
    assert (last.timings.n_prefilled, last.timings.n_forgotten) == (1, 0)
    _, notices, last = told(talk.ask(" and a cab?"))
    assert not notices
    assert last.timings.n_reused > 850


def test_a_turn_edited_far_back_is_run_anew_and_announced(generator: Generator) -> None:
    asked = f"abc {LONG}"
    told(session(generator).ask(asked))
    edited = f"abc {LONG[:-1]}!"  # near the end: the cache still has what its tokens see
    assert not told(session(generator).ask(edited))[1]
    other = f"abd {LONG}"
    given, notices, last = told(session(generator).ask(other))
    prompt = generator.tokenizer.encode(other)
    assert notices == [Forgotten(len(prompt), 1)]
    assert (last.timings.n_reused, last.timings.n_prefilled, last.timings.n_forgotten) == (0, len(prompt), 1)
    generator.backend.trim(0)
    assert told(session(generator).ask(other))[0] == given


def test_a_context_that_overflows_goes_on(generator: Generator) -> None:
    """Dropped turns take the prompt back behind the system prompt, which the cache has long let go."""
    talk = session(generator, max_tokens=20)
    talk.system = "be a bee. "
    for _ in range(3):
        given, notices, last = told(talk.ask(LONG))
    assert [type(event).__name__ for event in notices] == ["Dropped", "Forgotten"]
    assert last.timings.n_reused == 0
    fresh = session(generator, max_tokens=20)
    fresh.system = talk.system
    fresh.turns = talk.turns[:-1]
    generator.backend.trim(0)
    assert told(fresh.ask(LONG))[0] == given


def test_the_user_is_told(tiny_gemma: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgekv.backends.isolated.backend import IsolatedBackend

    engine = IsolatedBackend(tiny_gemma, n_ctx=2048, n_threads=1)
    talk = session(Generator(engine, engine.language(), engine.interrupt))
    show_answer(talk, engine, talk.ask(f"abc {LONG}"))
    talk.clear()
    capsys.readouterr()
    answer = show_answer(talk, engine, talk.ask(f"abd {LONG}"))
    n_prompt = len(engine.language().encode(f"abd {LONG}"))
    assert f"cannot go back that far: all {n_prompt} tokens are read again" in capsys.readouterr().err
    assert f"prefill {n_prompt} tokens (1 again)" in stats_line(answer, engine)
    assert figures(answer, engine)["n_forgotten"] == 1
    engine.close()
