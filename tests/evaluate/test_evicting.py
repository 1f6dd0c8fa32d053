"""Measures of a cache of fixed size: when it is cut, and that its figures are kept apart."""

from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.evicting import EvictingBackend
from edgekv.backends.open import open_backend
from edgekv.cache.policies.settings import Eviction
from edgekv.errors import InputError
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.retrieval import ask, make_haystack
from edgekv.evaluate.ruler.measure import RulerTasks, answer_task, measure_ruler, undisturbed
from edgekv.evaluate.ruler.tasks import AskedTask, TaskMaker
from edgekv.evaluate.windows import measure_windows, score_window
from edgekv.evaluate.workers import Run
from edgekv.reference.ops import log_softmax
from edgekv.text.scored import cut_windows
from edgekv.text.windows import OTHER_KINDS

BUDGET = 200
EVICTION = Eviction("keydiff", BUDGET, slice_size=2000)


@pytest.fixture(scope="module")
def task(tiny_llama: Path) -> AskedTask:
    return TaskMaker(OTHER_KINDS, read_tokenizer(tiny_llama), 0).make("niah_multikey_1", 640, 0)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each cut to the budget: the next position, and the rows that are left."""
    made: list[tuple[int, int]] = []
    cut = EvictingBackend.evict_to_budget

    def noted(backend: EvictingBackend) -> None:
        cut(backend)
        made.append((backend.n_past, backend.n_rows))

    monkeypatch.setattr(EvictingBackend, "evict_to_budget", noted)
    return made


@pytest.fixture
def evicting(tiny_llama: Path, task: AskedTask) -> EvictingBackend:
    eviction = undisturbed(EVICTION, [task])
    backend = open_backend(tiny_llama, "reference", n_ctx=1600, eviction=eviction)
    assert isinstance(backend, EvictingBackend)
    return backend


def test_a_blind_policy_chooses_before_the_question(
    tiny_llama: Path, task: AskedTask, evicting: EvictingBackend, cuts: list[tuple[int, int]]
) -> None:
    answer_task(evicting, (task, tiny_llama, False))
    assert cuts == [(len(task.context), BUDGET)]


def test_one_that_sees_the_question_chooses_behind_it(
    tiny_llama: Path, task: AskedTask, evicting: EvictingBackend, cuts: list[tuple[int, int]]
) -> None:
    """But before the answer's beginning; and once: the second question finds what is left."""
    answer_task(evicting, (task, tiny_llama, True))
    assert cuts == [(len(task.context) + len(task.questions[0].asked), BUDGET)]
    assert len(task.questions) == 2


def test_a_question_that_does_not_fit_the_budget_is_refused(tiny_llama: Path, task: AskedTask) -> None:
    """Nothing would be left of the context when the second question is asked."""
    small = open_backend(
        tiny_llama, "reference", n_ctx=1600, eviction=Eviction("keydiff", 64, slice_size=2000)
    )
    with pytest.raises(InputError, match="take a larger --budget"):
        answer_task(small, (task, tiny_llama, True))


def test_nothing_leaves_while_a_question_is_answered(tiny_llama: Path, task: AskedTask) -> None:
    """Or the second would be asked of less; by default 128 tokens that were decoded evict others."""
    eviction = undisturbed(EVICTION, [task])
    backend = open_backend(tiny_llama, "reference", n_ctx=1600, eviction=eviction)
    answer_task(backend, (task, tiny_llama, False))
    assert isinstance(backend, EvictingBackend)
    last = task.questions[-1]
    assert backend.n_rows >= BUDGET + len(last.tokens)
    assert backend.n_rows - BUDGET == backend.n_past - len(task.context)
    assert eviction.every > len(last.tokens) + last.limit > EVICTION.every


def test_figures_of_evicting_caches_are_kept_apart(tiny_llama: Path, tmp_path: Path) -> None:
    maker = TaskMaker(OTHER_KINDS, read_tokenizer(tiny_llama), 0)
    tasks = RulerTasks.make(maker, ("vt",), 640, 1)
    run = Run(tmp_path, lambda *_: None, 1, 1)
    for eviction in (None, EVICTION, Eviction("keydiff", 2 * BUDGET), Eviction("knorm", BUDGET)):
        subject = ModelUnderTest(tiny_llama, "reference", eviction=eviction)
        measure_ruler(tasks, maker, False, subject, run)
        measure_ruler(tasks, maker, True, subject, run)
    journals = {path.name for path in tmp_path.iterdir() if path.name.startswith("ruler-")}
    assert len({name.partition(".")[0] for name in journals}) == 1 + 2 * 3


def test_windows_are_cut_before_what_is_scored(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    """The end of a window is predicted from the rows that the policy keeps, at their positions."""
    tokenizer = read_tokenizer(tiny_llama)
    with pytest.raises(InputError, match="no 300 predictions"):
        cut_windows(letters, tokenizer, 300, 1, scored=300)
    text = cut_windows(letters, tokenizer, 300, 1, scored=40)
    assert (text.first, text.n_scored) == (259, 40)
    subject = ModelUnderTest(tiny_llama, "reference", eviction=EVICTION)
    result = measure_windows(subject, text, None, Run(tmp_path, lambda *_: None, 1, 1))
    assert result.tokens_scored == 40

    backend = open_backend(tiny_llama, "reference", n_ctx=300)
    evicting = open_backend(tiny_llama, "reference", n_ctx=300, eviction=EVICTION)
    assert isinstance(evicting, EvictingBackend)
    tokens = text.window(0)
    evicting.prefill(tokens[:259])
    evicting.evict(BUDGET)
    log_p = log_softmax(evicting.prefill_all(tokens[259:-1]))
    assert result.ppl == pytest.approx(np.exp(-log_p[np.arange(40), tokens[260:]].mean()), rel=1e-4)
    full = score_window(backend, (tokens, 259, None))["nll"] / 40
    assert np.exp(full) != pytest.approx(result.ppl, rel=1e-3)


def test_needles_are_asked_for_behind_the_cut(
    tiny_llama: Path, evicting: EvictingBackend, cuts: list[tuple[int, int]]
) -> None:
    """Every depth runs from the beginning: what is left of another prompt was chosen beside another line."""
    prompt = make_haystack(OTHER_KINDS, read_tokenizer(tiny_llama), 1408, 1).prompts[2]
    ask(evicting, prompt)
    assert cuts == [(len(prompt.prose) + len(prompt.line), BUDGET)] * 5
