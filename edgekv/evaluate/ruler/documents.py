"""Questions about documents, which are cut from a text (RULER's qa_1 and qa_2).

RULER asks what people wrote for SQuAD and HotpotQA. These need no data set: the first takes one document to answer,
the second needs a fact of one document to look up another fact elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekv.errors import InputError
from edgekv.evaluate.ruler.draft import SENTENCE_END, Draft, Question, Source
from edgekv.evaluate.ruler.words import people

WORDS = 50  # of a document, and on to the end of its sentence
MOST_WORDS = 90
TOKENS = 60  # no document has fewer
BEFORE, BEHIND = 12, 6  # words of a passage beside the missing one
# What is asked for, the best kind first: numbers, names (not behind a sentence's end), long words.
TARGETS = (re.compile(r"\d[\d,.]*\d\d"), re.compile(r"[A-Z][\w-]{4,}"), re.compile(r"[\w-]{7,}"))
EDGE = "\"'().,;:!?"
INTRO = "Read these documents. You will be asked about them at the end."

Words = Sequence[str]
Head = Callable[[int, int], str]


@dataclass(frozen=True)
class Passage:
    """Words of a document around one that can be asked for, and all of them as they stand there."""

    text: str
    before: str
    word: str
    behind: str


def missing_word(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """qa_1: a word that is missing in a passage of one document; again, of another."""
    documents, passages = _chosen(rng, source, length)
    questions = tuple(
        Question(
            f'\nWhich word is missing in this passage of the documents: "{passage.before} ____ {passage.behind}"?',
            f"In the documents it says: {passage.before}",
            (passage.word,),
        )
        for passage in passages
    )
    numbers = _shuffled(rng, len(documents))
    return Draft(INTRO, _body(rng, documents, lambda i, _: f"Document {numbers[i]}:"), questions)


def keeper(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """qa_2: who keeps the document that a passage is from, which stands above another document; again, of another."""
    documents, passages = _chosen(rng, source, length)
    names, numbers = people(rng, len(documents)), _shuffled(rng, len(documents))
    questions = tuple(
        Question(
            f'\nOne of the documents says "{passage.text}". Who keeps it?',
            "The keeper of that document is",
            (name,),
        )
        for passage, name in zip(passages, names, strict=False)
    )

    def head(i: int, other: int) -> str:
        return f"The keeper of Document {numbers[other]} is {names[other]}.\nDocument {numbers[i]}:"

    return Draft(INTRO, _body(rng, documents, head), questions)


def cut_documents(words: Words) -> tuple[tuple[str, ...], ...]:
    """A text as documents of whole sentences, where these are not too long."""
    found = []
    start = 0
    while len(words) - start >= WORDS:
        stop = start + WORDS
        while stop < min(start + MOST_WORDS, len(words)) and not SENTENCE_END.search(words[stop - 1]):
            stop += 1
        found.append(tuple(words[start:stop]))
        start = stop
    return tuple(found)


def _chosen(rng: np.random.Generator, source: Source, length: int) -> tuple[list[Words], list[Passage]]:
    """Documents enough for the length, the first two with a passage each; others repeat if the text is short."""
    asked: list[Words] = []
    passages: list[Passage] = []
    others: list[Words] = []
    for i in rng.permutation(len(source.documents)):
        document = source.documents[int(i)]
        if len(asked) < 2 and (passage := _passage(rng, document)):
            asked.append(document)
            passages.append(passage)
        else:
            others.append(document)
    if len(asked) < 2 or not others:
        raise InputError(
            f"{source.name} is too short to cut documents from, of {WORDS} words and more; give another with --text"
        )
    count = max(1, min(length // TOKENS, 3000))
    return asked + [others[i % len(others)] for i in range(count)], passages


def _passage(rng: np.random.Generator, document: Words) -> Passage | None:
    """A passage around a word that it has once, of the best kind that there is."""
    for kind in TARGETS:
        places = rng.permutation(np.arange(BEFORE, len(document) - BEHIND))
        for place in (int(i) for i in places):
            word = document[place].strip(EDGE)
            before = " ".join(document[place - BEFORE : place])
            behind = " ".join(document[place + 1 : place + 1 + BEHIND])
            named = not SENTENCE_END.search(document[place - 1])
            if named and kind.fullmatch(word) and word.lower() not in f"{before} {behind}".lower():
                return Passage(f"{before} {document[place]} {behind}", before, word, behind)
    return None


def _body(rng: np.random.Generator, documents: Sequence[Words], head: Head) -> Callable[[int], str]:
    """n words of documents behind the first two, which are always there, in random order, each below its head.

    A head names its own document and another, which stands half of all documents away.
    """
    places = rng.random(len(documents))

    def body(n: int) -> str:
        taken = list(documents[:2])
        for document in documents[2:]:
            if n <= 0:
                break
            taken.append(document[:n])
            n -= len(document)
        order = [int(i) for i in np.argsort(places[: len(taken)], kind="stable")]
        shift = len(order) // 2
        return "\n\n".join(
            f"{head(i, order[(at + shift) % len(order)])}\n{' '.join(taken[i])}" for at, i in enumerate(order)
        )

    return body


def _shuffled(rng: np.random.Generator, count: int) -> list[int]:
    """1 to count in random order."""
    return [int(i) + 1 for i in rng.permutation(count)]
