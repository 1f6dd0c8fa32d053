"""Needles: a value is asked for that stands once, somewhere in the context (RULER's niah_*)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekv.evaluate.ruler.draft import Draft, Question, Source, cycled, with_lines
from edgekv.evaluate.ruler.words import NOISE, keys, numbers, uuids

Values = Callable[[np.random.Generator, int], list[str]]
LINE_TOKENS = 8  # a line is longer in any vocabulary
MOST_LINES = 40_000


def in_noise(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_single_1: one number among sentences that repeat."""
    return _planted(rng, NOISE, numbers, n_keys=1)


def in_prose(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_single_2: one number in prose."""
    return _planted(rng, source.words, numbers, n_keys=1)


def uuid_in_prose(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_single_3: one UUID in prose."""
    return _planted(rng, source.words, uuids, n_keys=1)


def several_keys(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_multikey_1: one of four numbers in prose; again, another."""
    return _planted(rng, source.words, numbers, n_keys=4)


def all_lines(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_multikey_2: one number, where every other line is such a number too; again, another."""
    return _lines_only(rng, keys, numbers, "number", length)


def all_uuids(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_multikey_3: one UUID by a UUID, where every other line is such a pair too; again, another."""
    return _lines_only(rng, uuids, uuids, "code", length)


def several_values(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_multivalue: four numbers under one key, in four places of prose."""
    return _planted(rng, source.words, numbers, n_keys=1, n_values=4)


def several_queries(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """niah_multiquery: four numbers by four keys, all asked for at once."""
    return _planted(rng, source.words, numbers, n_keys=4, n_asked=4)


def _planted(
    rng: np.random.Generator,
    text: Sequence[str],
    values: Values,
    n_keys: int,
    n_values: int = 1,
    n_asked: int = 1,
) -> Draft:
    """Lines in prose: `n_values` for each of `n_keys`; the first `n_asked` keys are asked for."""
    names = keys(rng, n_keys)
    what = "code" if values is uuids else "number"
    found = values(rng, n_keys * n_values)
    of_key = [tuple(found[i * n_values : (i + 1) * n_values]) for i in range(n_keys)]
    lines = [
        (float(rng.random()), _line(what, name, value))
        for name, its in zip(names, of_key, strict=True)
        for value in its
    ]
    start = int(rng.integers(len(text)))
    questions = [_question(what, names[:n_asked], [value for its in of_key[:n_asked] for value in its])]
    if n_asked < n_keys:
        questions.append(_question(what, names[-1:], of_key[-1]))
    return Draft(
        _intro(what),
        lambda n: with_lines(cycled(text, start, n).split(" ") if n else [], lines),
        tuple(questions),
    )


def _lines_only(rng: np.random.Generator, named: Values, values: Values, what: str, length: int) -> Draft:
    """Lines that are all alike; the first pair drawn and the second are asked for, at depths of their own."""
    size = min(length // LINE_TOKENS + 2, MOST_LINES)
    pairs = list(zip(named(rng, size), values(rng, size), strict=True))
    first, again = (float(depth) for depth in rng.random(2))

    def body(n: int) -> str:
        others = min(n, size) - 2
        placed = [(first, pairs[0]), (again, pairs[1])]
        placed += [((i + 0.5) / others, pair) for i, pair in enumerate(pairs[2 : 2 + others])]
        return "\n".join(_line(what, *pair) for _, pair in sorted(placed))

    questions = tuple(_question(what, [name], [value]) for name, value in pairs[:2])
    return Draft(_intro(what), body, questions, least=2)


def _intro(what: str) -> str:
    return f"Secret {what}s are hidden in this text. Remember them: you will be asked for them at its end."


def _line(what: str, name: str, value: str) -> str:
    return f"The secret {what} of {name} is {value}."


def _question(what: str, names: Sequence[str], values: Sequence[str]) -> Question:
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(values) == 1:
        asked, opening = f"What is the secret {what} of {listed}", f"The secret {what} of {listed} is"
    else:
        asked, opening = f"What are all the secret {what}s of {listed}", f"The secret {what}s of {listed} are"
    return Question(f"\n{asked} in the text above?", opening, tuple(values))
