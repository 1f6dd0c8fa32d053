"""Tasks as they are asked: prompts of a wanted length in tokens, from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from edgekv.chat.session import PromptFormat
from edgekv.errors import InputError
from edgekv.evaluate.ruler import counting, documents, needles, tracking
from edgekv.evaluate.ruler.draft import Draft, Question, Source
from edgekv.text.files import read_hashed_text
from edgekv.tokenizer.tokenizer import Tokenizer

Match = Literal["all", "part"]
Make = Callable[[np.random.Generator, Source, int], Draft]
ANSWER_FACTOR, ANSWER_MORE = 2, 16  # tokens that an answer may have: twice those of the right one, and some

KINDS: Mapping[str, tuple[Make, Match]] = MappingProxyType(
    {
        "niah_single_1": (needles.in_noise, "all"),
        "niah_single_2": (needles.in_prose, "all"),
        "niah_single_3": (needles.uuid_in_prose, "all"),
        "niah_multikey_1": (needles.several_keys, "all"),
        "niah_multikey_2": (needles.all_lines, "all"),
        "niah_multikey_3": (needles.all_uuids, "all"),
        "niah_multivalue": (needles.several_values, "all"),
        "niah_multiquery": (needles.several_queries, "all"),
        "vt": (tracking.chain, "all"),
        "cwe": (counting.common_words, "all"),
        "fwe": (counting.frequent_words, "all"),
        "qa_1": (documents.missing_word, "part"),
        "qa_2": (documents.keeper, "part"),
    }
)


@dataclass(frozen=True)
class AskedQuestion:
    """A question as tokens, the beginning of its answer, which the model goes on from, and the answers."""

    asked: list[int]
    opening: list[int]
    answers: tuple[str, ...]
    limit: int  # tokens that the model may write

    @property
    def tokens(self) -> list[int]:
        """All that comes behind the context."""
        return self.asked + self.opening


@dataclass(frozen=True)
class AskedTask:
    """A task as tokens. The context and the first question together are `length` tokens or slightly less."""

    kind: str
    length: int
    context: list[int]
    questions: tuple[AskedQuestion, ...]

    @property
    def match(self) -> Match:
        """How its answers are scored."""
        return KINDS[self.kind][1]

    @property
    def room(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return len(self.context) + max(len(question.tokens) + question.limit for question in self.questions)


class TaskMaker:
    """Makes tasks for one model's tokens, of one text.

    Context and question are the user's message where the model has a chat template; else one text.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, seed: int) -> None:
        text, self.sha256 = read_hashed_text(path, "--text")
        words = text.split()
        self.source = Source(path.name, words, documents.cut_documents(words))
        self.seed = seed
        self._tokenizer = tokenizer
        self._before, self._behind = PromptFormat.of_model(tokenizer).around_question()

    def make(self, kind: str, length: int, index: int) -> AskedTask:
        """The task of this number; it depends on nothing but the text, the vocabulary, the seed and these.

        Raises:
            InputError: the length is too short for the kind, or the text is.
        """
        make, _ = KINDS[kind]
        rng = np.random.default_rng((self.seed, list(KINDS).index(kind), length, index))
        draft = make(rng, self.source, length)
        questions = tuple(self._asked(question) for question in draft.questions)
        limit = length - len(self._before) - len(questions[0].tokens)
        context = draft.fitted(limit, lambda text: len(self._tokenizer.encode(text))) if limit > 0 else None
        if context is None:
            raise InputError(f"{kind} does not fit {length} tokens; take larger --lengths, or leave it out")
        return AskedTask(kind, length, [*self._before, *self._tokenizer.encode(context)], questions)

    def _asked(self, question: Question) -> AskedQuestion:
        encode = self._tokenizer.encode
        # Without a template the answer's beginning follows in the same line of text.
        opening = question.opening if self._behind else f" {question.opening}"
        limit = ANSWER_FACTOR * len(encode(" " + ", ".join(question.answers))) + ANSWER_MORE
        return AskedQuestion(
            [*encode(question.text), *self._behind], encode(opening), question.answers, limit
        )


def score(match: Match, written: str, answers: Sequence[str]) -> float:
    """RULER's string match, letters of either case alike: the share of the answers that were written, or ("part")
    whether any was."""
    found = [answer.lower() in written.lower() for answer in answers]
    return float(any(found)) if match == "part" else sum(found) / len(found)
