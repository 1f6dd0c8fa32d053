"""Choice scoring against full log-probabilities, prompts against the harness's, errors against the bootstrap."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.backends.open import open_backend
from edgekv.errors import InputError
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.task_formats import Choice, Question, Task, read_task
from edgekv.evaluate.tasks import (
    Scores,
    TaskResult,
    continuation_tokens,
    mean_relative_change,
    measure_task,
    task_result,
)
from edgekv.evaluate.workers import Run
from edgekv.reference.ops import log_softmax

ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada": [{"text": "the fox met the fox"}, {"text": "a bed, a cab, a bed"}, {"text": "he he he he"}],
    "arc_easy": [
        {"query": "Which is wet?", "choices": ["sea", "a bag of sand"], "gold": 0},
        {"query": "Which is hot?", "choices": ["ice", "fire", "a cold bath"], "gold": 1},
        {"query": "Which is big?", "choices": ["an ant", "gnat", "elephant", "bee"], "gold": 2},
    ],
    "winogrande": [
        {"query": "Ann beat Bo since _ was fast.", "choices": ["Ann", "Bo"], "gold": 0},
        {"query": "Cy fed Di because _ was hungry.", "choices": ["Cy", "Di"], "gold": 1},
    ],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(task: Task, path: Path, folder: Path, backend: str = "llama.cpp") -> list[Scores]:
    cache_type = "f32" if backend == "llama.cpp" else None
    subject = ModelUnderTest(path, backend, cache_type)  # type: ignore[arg-type]
    return measure_task(read_tokenizer(path), task, subject, Run(folder, lambda *_: None, 1, 1))


def by_hand(path: Path, choice: Choice) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding writes it, from one run over everything."""
    tokenizer = read_tokenizer(path)
    before, whole = tokenizer.encode(choice.context), tokenizer.encode(choice.context + choice.continuation)
    assert whole[: len(before)] == before
    backend = open_backend(path, "reference", n_ctx=256)
    log_p = log_softmax(backend.prefill_all(whole))
    rows = log_p[len(before) - 1 : -1]
    targets = whole[len(before) :]
    return float(rows[np.arange(len(rows)), targets].sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", ["llama.cpp", "reference"])
def test_scores_are_those_of_full_log_probabilities(
    name: str, backend: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """What choices share is run once and the cache trimmed back; that must change nothing."""
    task = read_task(name, write_rows(tmp_path / "rows.jsonl", ROWS[name]), None)
    found = measured(task, tiny_llama, tmp_path / "cache", backend)
    assert len(found) == len(ROWS[name])
    for question, scores in zip(task.questions, found, strict=True):
        for choice, (log_p, greedy) in zip(question.choices, scores, strict=True):
            expected, written = by_hand(tiny_llama, choice)
            assert log_p == pytest.approx(expected, rel=1e-3)
            assert bool(greedy) == written


def test_greedy_decoding_that_writes_the_word_counts(tiny_llama: Path, tmp_path: Path) -> None:
    """The last word is made what the model really writes, three letters long, then something else."""
    tokenizer = read_tokenizer(tiny_llama)
    backend = open_backend(tiny_llama, "reference", n_ctx=64)
    for start in ("abc", "the", "fox", "zoo", "my", "in"):
        backend.trim(0)
        token = int(backend.prefill(tokenizer.encode(f"{start} "))[:128].argmax())
        word = tokenizer.decode([token])
        if word.strip() and tokenizer.encode(f"{start} {word}") == [*tokenizer.encode(f"{start} "), token]:
            break
    else:
        raise AssertionError("the model writes no letter")
    choice = Choice(f"{start} ", word, 1)
    other = Choice(f"{start} ", "q" if word != "q" else "r", 1)
    task = Task("lambada", "made.jsonl", "0" * 64, (Question((choice,), 0), Question((other,), 0)))
    greedy = [scores[0][1] for scores in measured(task, tiny_llama, tmp_path)]
    assert greedy == [by_hand(tiny_llama, choice)[1], False]


def test_prompts_are_those_of_the_harness(tmp_path: Path) -> None:
    """lm_eval/tasks: lambada_openai, arc, piqa, hellaswag (doc_to_text, target_delimiter " "), winogrande's
    partial evaluation."""

    def first(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
        task = read_task(name, write_rows(tmp_path / name, [row]), None)
        return [(choice.context, choice.continuation) for choice in task.questions[0].choices]

    choices = {"query": "How?", "choices": ["so", "not so"], "gold": 1}
    answers = [("Question: How?\nAnswer:", " so"), ("Question: How?\nAnswer:", " not so")]
    assert first("lambada", {"text": "To be or not to be"}) == [("To be or not to", " be")]
    assert first("arc_easy", choices) == answers
    assert first("piqa", choices) == answers
    assert first("hellaswag", choices) == [("How?", " so"), ("How?", " not so")]
    assert first("winogrande", {"query": "Al hit Bob, so _ fell.", "choices": ["Al", "Bob"], "gold": 1}) == [
        ("Al hit Bob, so Al", " fell."),
        ("Al hit Bob, so Bob", " fell."),
    ]


def questions(n: int) -> Task:
    """Two choices each, of 10 and 2 characters; the first is right."""
    pair = (Choice("c", " " + "x" * 10, 10), Choice("c", " xy", 2))
    return Task("piqa", "rows.jsonl", "0" * 64, (Question(pair, 0),) * n)


def test_accuracy_by_length_and_by_sum() -> None:
    """-8 over 10 characters beats -3 over 2, but not as a sum."""
    scores: list[Scores] = [
        [(-8.0, False), (-3.0, False)],
        [(-8.0, False), (-1.0, False)],
        [(-2.0, False), (-3.0, False)],
        [(-8.0, False), (-3.0, False)],
    ]
    result = task_result(questions(4), scores, None)
    assert (result.accuracy, result.accuracy_sum, result.chance) == (0.75, 0.25, 0.5)
    assert result.accuracy_se == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert result.target_ppl is None


def test_relative_change_and_its_error_are_the_bootstraps() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(400) < 0.6
    model = np.where(rng.random(400) < 0.2, rng.random(400) < 0.4, base)

    def scores(right: np.ndarray) -> list[Scores]:
        return [[(0.0, False), (-9.0, False)] if hit else [(-9e9, False), (0.0, False)] for hit in right]

    result = task_result(questions(400), scores(model), scores(base))
    assert result.relative_change == pytest.approx(model.mean() / base.mean() - 1)
    draws = rng.integers(0, 400, (4000, 400))
    bootstrap = (model[draws].mean(1) / base[draws].mean(1)).std()
    assert result.relative_change_se == pytest.approx(bootstrap, rel=0.05)
    mean = mean_relative_change([result, result])
    assert mean is not None
    assert mean == pytest.approx((result.relative_change, bootstrap / 2**0.5), rel=0.05)


def test_a_model_against_itself_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    task = read_task("arc_easy", write_rows(tmp_path / "rows.jsonl", ROWS["arc_easy"]), None)
    scores = measured(task, tiny_llama, tmp_path / "cache")
    result: TaskResult = task_result(task, scores, scores)
    assert result.relative_change in (0, None)
    assert result.accuracy == result.reference_accuracy


def test_interrupted_it_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS["arc_easy"])
    first = measured(read_task("arc_easy", path, 2), tiny_llama, tmp_path / "cache")
    whole = measured(read_task("arc_easy", path, None), tiny_llama, tmp_path / "cache")
    assert [[tuple(s) for s in scores] for scores in whole[:2]] == [[tuple(s) for s in x] for x in first]
    monkeypatch.setattr("edgekv.evaluate.workers.open_engine", None)
    again = measured(read_task("arc_easy", path, None), tiny_llama, tmp_path / "cache")
    assert [len(scores) for scores in again] == [2, 3, 4]


def test_tokens_that_join_across_the_seam(tiny_llama: Path) -> None:
    """`ab` is one token: of "a" + "b" only it is left, and it has to be scored behind what stands before."""
    tokenizer = read_tokenizer(tiny_llama)
    joined = continuation_tokens(tokenizer, "xa", "b")
    assert tokenizer.decode(joined.ids) == "xab"
    assert (len(joined.ids), joined.first) == (2, 1)
    with pytest.raises(InputError, match="nothing before 'b'"):
        continuation_tokens(tokenizer, "", "b")


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("piqa", "{", "line 2"),
        ("piqa", '{"query": "q", "choices": ["a"], "gold": 1}', "gold is no choice"),
        ("piqa", '{"query": "q", "choices": ["a", ""], "gold": 0}', "a choice is empty"),
        ("piqa", '{"query": "q", "choices": ["a", "b"], "gold": "0"}', "line 2"),
        ("piqa", '{"query": "q", "choices": ["a", 1], "gold": 0}', "line 2"),
        ("piqa", '{"query": "q", "gold": 0}', "'choices'"),
        ("winogrande", '{"query": "no gap", "choices": ["a", "b"], "gold": 0}', "no _"),
        ("lambada", '{"text": "word"}', "single word"),
        ("lambada", '{"text": 5}', "line 2"),
        ("lambada", "7", "line 2"),
    ],
)
def test_malformed_questions_are_named_by_line(name: str, line: str, problem: str, tmp_path: Path) -> None:
    good = ROWS["arc_easy" if name == "piqa" else name][0]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(InputError, match=problem) as caught:
        read_task(name, path, None)
    assert "line 2" in str(caught.value)
    assert "wanted is JSON such as" in str(caught.value)


def test_unknown_tasks_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'mmlu'; there are lambada, arc_easy"):
        read_task("mmlu", tmp_path / "x", None)
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is empty"):
        read_task("piqa", tmp_path / "x", None)
    with pytest.raises(InputError, match="cannot read"):
        read_task("piqa", tmp_path / "y", None)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\u200b"])
def test_questions_as_other_tools_write_them(ends: str, letter: str, tmp_path: Path) -> None:
    """Unescaped letters that end a line for str.splitlines and not for JSON, a byte order mark, blank lines."""
    rows = [row | {"query": f"one{letter}two"} for row in ROWS["arc_easy"]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ends.join([lines[0], "", lines[1], "  ", lines[2], "", ""]).encode("utf-8-sig"))
    task = read_task("arc_easy", path, None)
    assert [question.gold for question in task.questions] == [0, 1, 2]
    assert task.questions[0].choices[0].context == f"Question: one{letter}two\nAnswer:"
    assert read_task("arc_easy", path, 2).questions == task.questions[:2]
    path.write_bytes(path.read_bytes() + b"{}")
    with pytest.raises(InputError, match="line 7: not a question"):
        read_task("arc_easy", path, None)


def test_choices_behind_a_window_are_scored_as_by_a_fresh_cache(tiny_gemma: Path, tmp_path: Path) -> None:
    """A long choice pushes what the choices share out of the cells of a window of 64 tokens."""
    choices = ["a bad cab " * 80, "a bed", "abc" * 300]
    rows = [{"query": "Which is wet? " + "xyz " * 10, "choices": choices, "gold": 0}]
    task = read_task("arc_easy", write_rows(tmp_path / "rows.jsonl", rows), None)
    fast, slow = (measured(task, tiny_gemma, tmp_path / kind, kind)[0] for kind in ("llama.cpp", "reference"))
    np.testing.assert_allclose([score for score, _ in fast], [score for score, _ in slow], rtol=1e-3)


def test_questions_in_another_form_are_told_what_is_missing(tmp_path: Path) -> None:
    row = {"question": "Which is wet?", "choices": {"text": ["sea"], "label": ["A"]}, "answerKey": "A"}
    path = write_rows(tmp_path / "hub.jsonl", [row])
    with pytest.raises(InputError, match=r"line 1: not a question of arc_easy: it has no 'query'; wanted is"):
        read_task("arc_easy", path, None)
    path.write_text(json.dumps(ROWS["arc_easy"]))
    with pytest.raises(InputError, match=r"it is no JSON object; .*, one object a line"):
        read_task("arc_easy", path, None)


@pytest.mark.parametrize("row", [{"query": 5}, {"choices": [["sea"], ["sand"]]}, {"choices": ["sea", None]}])
def test_questions_that_are_no_text(row: dict[str, object], tmp_path: Path) -> None:
    """Not asked as Python would print them."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["arc_easy"][0] | row])
    with pytest.raises(InputError, match="line 1: not a question of arc_easy"):
        read_task("arc_easy", path, None)
