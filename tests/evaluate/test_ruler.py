"""RULER's tasks: what they contain, how long they are, how answers are scored, and that models are asked them."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import InputError
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.ruler.measure import RulerScore, RulerTasks, measure_ruler, ruler_result
from edgekv.evaluate.ruler.tasks import KINDS, AskedTask, TaskMaker, score
from edgekv.evaluate.workers import Run
from edgekv.text.windows import OTHER_KINDS
from edgekv.tokenizer.tokenizer import Tokenizer

LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return read_tokenizer(smollm2)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> TaskMaker:
    return TaskMaker(OTHER_KINDS, tokenizer, 7)


@pytest.fixture(scope="module")
def tasks(maker: TaskMaker) -> dict[str, AskedTask]:
    return {kind: maker.make(kind, LENGTH, 3) for kind in KINDS}


def test_lengths_are_within_one_percent_and_never_more(maker: TaskMaker, tasks: dict[str, AskedTask]) -> None:
    assert len(KINDS) == 13
    longer = [maker.make(kind, 2500, 0) for kind in ("niah_multikey_3", "cwe", "fwe", "qa_2")]
    for task in [*tasks.values(), *longer]:
        n_tokens = len(task.context) + len(task.questions[0].tokens)
        assert 0.99 * task.length <= n_tokens <= task.length, task.kind


def test_the_same_seed_makes_the_same_task(maker: TaskMaker, tokenizer: Tokenizer) -> None:
    again, other = (TaskMaker(OTHER_KINDS, tokenizer, seed) for seed in (7, 8))
    for kind in KINDS:
        task = maker.make(kind, 700, 1)
        assert task == again.make(kind, 700, 1)
        assert task.context != other.make(kind, 700, 1).context, kind
        assert task.context != maker.make(kind, 700, 2).context, kind


def test_prompts_are_the_users_message(tokenizer: Tokenizer, tasks: dict[str, AskedTask]) -> None:
    for task in tasks.values():
        shown = tokenizer.decode(task.context + task.questions[0].tokens, special=True)
        assert shown.count("<|im_start|>user\n") == shown.count("<|im_start|>assistant\n") == 1
        assert "?<|im_end|>\n<|im_start|>assistant\n" in shown


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("niah")])
def test_needles_stand_where_they_are_asked_for(
    tokenizer: Tokenizer, tasks: dict[str, AskedTask], kind: str
) -> None:
    """Every answer stands once in a line that has the key of its question, and no other line has both."""
    context = tokenizer.decode(tasks[kind].context)
    lines = re.findall(r"The secret (?:number|code) of (\S+) is (\S+)\.", context)
    assert len({value for _, value in lines}) == len(lines)
    for question in tasks[kind].questions:
        asked = tokenizer.decode(question.tokens)
        found = {value for key, value in lines if key in asked}
        assert found == set(question.answers)
        assert not any(answer in asked for answer in question.answers)
    expected = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    if kind in ("niah_multikey_2", "niah_multikey_3"):
        assert len(lines) > 8
    else:
        assert len(lines) == expected.get(kind, 1)
    assert len(tasks[kind].questions) == (2 if "multikey" in kind else 1)
    assert len({question.answers for question in tasks[kind].questions}) == len(tasks[kind].questions)


def test_needles_are_spread(maker: TaskMaker, tokenizer: Tokenizer) -> None:
    depths = []
    for i in range(16):
        task = maker.make("niah_single_2", 512, i)
        context = tokenizer.decode(task.context)
        depths.append(context.index(task.questions[0].answers[0]) / len(context))
    assert np.histogram(depths, 4, (0, 1))[0].min() >= 1


def test_the_chain_leads_from_the_value_to_every_variable(
    tokenizer: Tokenizer, tasks: dict[str, AskedTask]
) -> None:
    found: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", tokenizer.decode(tasks["vt"].context)):
        found[name] = found.get(source, source)  # as the text is read, from its beginning
    question = tasks["vt"].questions[0]
    value = re.search(r"have the value (\d{5})", tokenizer.decode(question.tokens))
    assert value is not None
    assert set(found.values()) == {value[1]}
    assert tuple(found) == question.answers
    assert len(found) == 5


def test_common_words_are_the_most_common(tokenizer: Tokenizer, maker: TaskMaker) -> None:
    for length in (700, 4096):
        task = maker.make("cwe", length, 0)
        entries = re.findall(r"(\d+)\. ([a-z-]+)", tokenizer.decode(task.context))
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries).most_common()
        assert {word for word, _ in counts[:10]} == set(task.questions[0].answers)
        assert counts[9][1] > counts[10][1]
    assert counts[0][1] == 10 * counts[10][1] == 30 or counts[0][1] < 30


def test_frequent_words_are_the_most_frequent(tokenizer: Tokenizer, tasks: dict[str, AskedTask]) -> None:
    text = tokenizer.decode(tasks["fwe"].context)
    counts = Counter(re.findall(r"\b[a-z]{6}\b", text.partition("coded text.")[2])).most_common()
    assert tuple(word for word, _ in counts[:3]) == tasks["fwe"].questions[0].answers
    assert len({count for _, count in counts[:4]}) == 4
    assert text.count("....") > counts[0][1]


def test_the_missing_word_stands_in_a_document(tokenizer: Tokenizer, tasks: dict[str, AskedTask]) -> None:
    text = " ".join(tokenizer.decode(tasks["qa_1"].context).split())
    for question in tasks["qa_1"].questions:
        asked = tokenizer.decode(question.tokens)
        passage = re.search(r'documents: "(.*) ____ (.*)"\?', asked)
        assert passage is not None
        assert question.answers[0] not in asked
        between = re.search(f"{re.escape(passage[1])} (\\S+) {re.escape(passage[2])}", text)
        assert between is not None
        assert question.answers[0] in between[1]


def test_the_keeper_is_found_in_two_steps(tokenizer: Tokenizer, tasks: dict[str, AskedTask]) -> None:
    text = tokenizer.decode(tasks["qa_2"].context)
    keepers = dict(re.findall(r"The keeper of Document (\d+) is (\w+ \w+)\.", text))
    documents = dict(re.findall(r"^Document (\d+):\n(.*)", text, re.MULTILINE))
    assert keepers.keys() == documents.keys()
    assert len(set(keepers.values())) == len(keepers) > 4
    for question in tasks["qa_2"].questions:
        passage = re.search(r'says "(.*)"\. Who', tokenizer.decode(question.tokens))
        assert passage is not None
        numbers = [number for number, document in documents.items() if passage[1] in document]
        assert [(keepers[number],) for number in numbers] == [question.answers]


def test_string_match() -> None:
    answers = ("1234567", "7654321", "1111111", "2222222")
    assert score("all", " 1234567, 7654321.", answers) == 0.5
    assert (
        score("all", "1234567 7654321 1111111 and 22222222", answers) == 1
    )  # as RULER: inside of another too
    assert score("all", "none", answers) == 0
    assert score("all", " it was in PARIS", ("Paris",)) == 1
    assert score("part", "Pari", ("Paris", "the city")) == 0
    assert score("part", "In the City of light", ("Paris", "the city")) == 1


def test_what_is_too_short_is_refused(maker: TaskMaker, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(InputError, match=f"{kind} does not fit 60 tokens"):
            maker.make(kind, 60, 0)
    short = tmp_path / "short.txt"
    short.write_text("Too little to cut anything from it.")
    with pytest.raises(InputError, match=r"short\.txt is too short to cut documents from"):
        TaskMaker(short, tokenizer, 0).make("qa_1", 1024, 0)


def test_standard_errors_and_changes() -> None:
    own, base = np.array([1.0, 0.5, 0.0, 0.5]), np.array([1.0, 1.0, 0.5, 1.0])
    found = RulerScore.of(own, base)
    assert found.score == 0.5
    assert found.score_se == pytest.approx(own.std(ddof=1) / 2)
    assert (found.reference_score, found.change) == (0.875, -0.375)
    assert found.change_se == pytest.approx((own - base).std(ddof=1) / 2)
    both = RulerScore.mean([found, RulerScore.of(base, base)])
    assert (both.score, both.change) == (0.6875, -0.1875)
    assert both.change_se == pytest.approx(found.change_se / 2)


def test_a_model_is_asked_and_a_killed_run_goes_on(tiny_llama: Path, letters: Path, tmp_path: Path) -> None:
    """Every token is a letter here: the same tasks, of another vocabulary, answered by chance."""
    tokenizer = read_tokenizer(tiny_llama)
    maker = TaskMaker(OTHER_KINDS, tokenizer, 0)
    tasks = RulerTasks.make(maker, ("niah_multikey_1", "vt"), 700, 2)
    subject = ModelUnderTest(tiny_llama, cache_type="f32")
    calls: list[tuple[int, int]] = []
    run = Run(tmp_path, lambda done, total, figures: calls.append((done, total)), 1, 1)
    scores = measure_ruler(tasks, maker, False, subject, run)
    assert [len(found) for found in scores] == [2, 1, 2, 1]
    assert calls == [(i, 4) for i in range(5)]
    (journal,) = [path for path in tmp_path.iterdir() if path.name.startswith("ruler-") and path.suffix == ""]
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))
    calls.clear()
    assert measure_ruler(tasks, maker, False, subject, run) == scores
    assert calls == [(2, 4), (3, 4), (4, 4)]
    assert journal.read_bytes().splitlines(keepends=True) == lines
    texts = [json.loads(line)[1][1] for line in lines[1:]]
    assert all(text for written in texts for text in written)
    result = ruler_result(maker, [tasks], [scores], [scores])
    assert [(cell.kind, cell.again is None) for cell in result.cells] == [
        ("niah_multikey_1", False),
        ("vt", True),
    ]
    assert result.samples == 2
    assert result.means[0].first.change == 0
