"""Variable tracking: who else got a value, through a chain of assignments (RULER's vt)."""

from __future__ import annotations

import numpy as np

from edgekv.evaluate.ruler.draft import Draft, Question, Source, cycled, with_lines
from edgekv.evaluate.ruler.words import NOISE, letter_words, numbers

HOPS = 4
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def chain(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """vt: one chain of five variables in noise, each assigned from the one before it."""
    names = letter_words(rng, HOPS + 1, 5, LETTERS)
    value = numbers(rng, 1, 5)[0]
    sources = [value, *(f"VAR {name}" for name in names)]
    depths = sorted(float(depth) for depth in rng.random(len(names)))
    # Depths in falling order would assign from a variable that has no value yet.
    lines = [
        (depth, f"VAR {name} = {source}") for depth, name, source in zip(depths, names, sources, strict=False)
    ]
    start = int(rng.integers(len(NOISE)))
    question = Question(
        f"\nWhich variables have the value {value}, by all assignments in the text above?",
        f"{len(names)} variables have the value {value}. They are",
        tuple(names),
    )
    return Draft(
        "Variables are assigned in this text. Keep track of what each of them has for a value.",
        lambda n: with_lines(cycled(NOISE, start, n).split(" ") if n else [], lines),
        (question,),
    )
