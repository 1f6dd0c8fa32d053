"""A task before it has its length: what is asked, and a context that grows by the word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekv.evaluate.ruler.words import NOISE

TOLERANCE = 0.004  # of the length: contexts are not made to fit closer
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


@dataclass(frozen=True)
class Source:
    """A text that tasks are made of: its words, and documents cut from it."""

    name: str
    words: Sequence[str]
    documents: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Question:
    """What is asked about a context.

    `text` begins with a line break, `opening` is the beginning of the answer that the model goes on from, and
    `answers` are the texts that are looked for in what it writes.
    """

    text: str
    opening: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A task of any length.

    `body(n)` is a context of `n` units, a word or a line each; one of more units has more tokens. `least` is the
    smallest. The second question, where there is one, is about another place of the same context.
    """

    intro: str
    body: Callable[[int], str]
    questions: tuple[Question, ...]
    least: int = 0

    def fitted(self, limit: int, count: Callable[[str], int]) -> str | None:
        """The context in nearly `limit` tokens and never more; None if not even the smallest fits.

        What is less than one unit is filled with words that mean nothing, in front.
        """
        near = limit - int(TOLERANCE * limit)
        context = _longest(lambda n: f"{self.intro}\n{self.body(n)}", self.least, limit, near, count)
        if context is None or count(context) >= near:
            return context
        head, rest = f"{self.intro}\n", context.removeprefix(f"{self.intro}\n")
        return _longest(
            lambda n: f"{head}{cycled(NOISE, 0, n)}\n{rest}" if n else context, 0, limit, near, count
        )


def cycled(words: Sequence[str], start: int, count: int) -> str:
    """`count` words from `start` on, beginning again at the end."""
    return " ".join(words[(start + i) % len(words)] for i in range(count))


def with_lines(words: Sequence[str], lines: Sequence[tuple[float, str]]) -> str:
    """Prose with lines planted in it, each at its depth of 0 to 1, behind a sentence if one ends near."""
    places = sorted((_sentence_end(words, round(depth * len(words))), line) for depth, line in lines)
    parts: list[str] = []
    at = 0
    for place, line in places:
        parts += [" ".join(words[at:place]), line]
        at = place
    parts.append(" ".join(words[at:]))
    return "\n".join(filter(None, parts))


def _sentence_end(words: Sequence[str], place: int, reach: int = 40) -> int:
    """The last place up to `place` that has a sentence's end before it; `place` itself if none is near."""
    for i in range(place, max(place - reach, 0), -1):
        if SENTENCE_END.search(words[i - 1]):
            return i
    return place if place > reach else 0


def _longest(
    build: Callable[[int], str], least: int, limit: int, near: int, count: Callable[[str], int]
) -> str | None:
    """The longest of build(least), build(least + 1)... within `limit` tokens, or the first with `near` or more."""
    low, best = least, build(least)
    if (found := count(best)) > limit:
        return None
    high, above = None, 0  # a size that is too large, and its tokens
    while found < near and (high is None or high - low > 1):
        if high is None:
            guess = low + max(1, min(round((limit - found) * max(low, 8) / max(found, 1)), 4 * max(low, 8)))
        else:
            guess = low + round((high - low) * (limit - found) / (above - found))
            guess = min(max(guess, low + 1), high - 1)
        text = build(guess)
        if (tokens := count(text)) <= limit:
            low, best, found = guess, text, tokens
        else:
            high, above = guess, tokens
    return best
