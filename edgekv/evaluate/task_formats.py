"""Zero-shot tasks: files of questions, and the continuations whose probability decides.

Prompts are those of EleutherAI's lm-evaluation-harness (lm_eval/tasks), so that figures compare. A file is JSON
lines: `{"text"}` for LAMBADA, `{"query", "choices", "gold"}` for the others; WinoGrande's query has one `_`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import InputError
from edgekv.text.files import read_hashed_text


@dataclass(frozen=True)
class Choice:
    """A context and how it may go on. `length` is what the log-probability is divided by: characters of the
    choice itself."""

    context: str
    continuation: str
    length: int


@dataclass(frozen=True)
class Question:
    """Choices, and which is right. With a single one, the question is whether the model would write it."""

    choices: tuple[Choice, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A file of questions."""

    name: str
    file: str
    sha256: str
    questions: tuple[Question, ...]


def _last_word(row: Mapping[str, Any]) -> Question:
    context, _, word = row["text"].rstrip().rpartition(" ")
    if not context:
        raise ValueError("the text is a single word")
    return Question((Choice(context, f" {word}", len(word)),), 0)


def _answers(prompt: Callable[[str], str]) -> Callable[[Mapping[str, Any]], Question]:
    def read(row: Mapping[str, Any]) -> Question:
        context = prompt(row["query"])
        return Question(
            tuple(Choice(context, f" {choice}", len(choice)) for choice in row["choices"]), row["gold"]
        )

    return read


def _fill_in(row: Mapping[str, Any]) -> Question:
    """What follows the gap decides, given each choice in it (arXiv 1806.02847, partial evaluation)."""
    before, gap, after = row["query"].partition("_")
    if not gap:
        raise ValueError("the query has no _")
    after = after.strip()
    return Question(
        tuple(Choice(before + choice, f" {after}", len(after)) for choice in row["choices"]), row["gold"]
    )


_QUESTION = _answers("Question: {}\nAnswer:".format)
TASKS: Mapping[str, Callable[[Mapping[str, Any]], Question]] = {
    "lambada": _last_word,
    "arc_easy": _QUESTION,
    "piqa": _QUESTION,
    "winogrande": _fill_in,
    "hellaswag": _answers(str),
}


def read_task(name: str, path: Path, limit: int | None) -> Task:
    """The first `limit` questions of a file; blank lines are passed over.

    Raises:
        InputError: there is no such task, or the file cannot be read; the message names the line.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    text, sha256 = read_hashed_text(path)
    lines = re.split(r"\r\n?|\n", text)  # str.splitlines would cut at U+2028, which JSON allows in a string
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if len(questions) == limit:
            break
        if not line.strip():
            continue
        try:
            question = _question(name, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{path}, line {number}: not a question of {name}: {why}; wanted is JSON such as {_example(name)}, "
                "one object a line"
            ) from error
        questions.append(question)
    if not questions:
        raise InputError(f"{path} is empty; it should hold questions of {name}: {_example(name)}")
    return Task(name, path.name, sha256, tuple(questions))


def _question(name: str, row: Any) -> Question:
    """The question of a row; any of the errors that `read_task` handles if it is none."""
    if not isinstance(row, dict):
        raise TypeError("it is no JSON object")
    question = TASKS[name](row)
    if type(question.gold) is not int:
        raise ValueError("gold is no whole number")
    if not all(isinstance(text, str) for text in (row.get("query", ""), *row.get("choices", ()))):
        raise TypeError("the query or a choice is no text")
    if not 0 <= question.gold < len(question.choices) or not all(c.length for c in question.choices):
        raise ValueError("gold is no choice, or a choice is empty")
    return question


def _example(name: str) -> str:
    if name == "lambada":
        return '{"text": "..."}'
    gap = "... _ ..." if name == "winogrande" else "..."
    return f'{{"query": "{gap}", "choices": ["...", "..."], "gold": 0}}'
