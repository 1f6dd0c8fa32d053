"""Words that stand most often in a list or a text (RULER's cwe and fwe)."""

from __future__ import annotations

import numpy as np

from edgekv.evaluate.ruler.draft import Draft, Question, Source
from edgekv.evaluate.ruler.words import NOUNS, keys, letter_words

COMMON = 10  # words that the first kind asks for
MOST_OFTEN = 30  # times that each of them stands in a list, at most; the other words stand a tenth as often
ALPHA = 2.0  # exponent of the zeta distribution of the second kind
CODED_TOKENS = 2  # a coded word is longer in any vocabulary
DOTS = "...."


def common_words(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """cwe: the ten words of a numbered list that stand in it ten times as often as the others.

    A third of the list are common words, up to 30 times each; in short lists they stand less often.
    """
    drawn = [NOUNS[int(i)] for i in rng.permutation(len(NOUNS))]
    common, rare = drawn[:COMMON], drawn[COMMON:]
    more = [pair for pair in keys(rng, min(length // 4, 30_000)) if pair.split("-")[1] not in common]
    places = rng.random(length)

    def body(n: int) -> str:
        times = min(MOST_OFTEN, n // (3 * COMMON))
        others = [word for word in [*rare, *more] for _ in range(max(1, times // 10))]
        words = (common * times + others)[: min(n, length)]
        order = np.argsort(places[: len(words)], kind="stable")
        return " ".join(f"{i + 1}. {words[int(at)]}" for i, at in enumerate(order))

    question = Question(
        f"\nWhich {COMMON} words stand most often in the list above?",
        f"The {COMMON} words that stand most often in the list are",
        tuple(common),
    )
    intro = (
        "In this numbered list some words stand more often than others. Remember those that stand most often."
    )
    return Draft(intro, body, (question,), least=3 * COMMON * 2)


def frequent_words(rng: np.random.Generator, source: Source, length: int) -> Draft:
    """fwe: the three most frequent coded words of a text whose words follow a zeta distribution.

    The most frequent of all is a row of dots and does not count.
    """
    kinds = max(length // 50, 8)
    words = [DOTS, *letter_words(rng, kinds - 1, 6, "abcdefghijklmnopqrstuvwxyz")]
    shares = np.arange(1, kinds + 1, dtype=np.float64) ** -ALPHA
    shares /= shares.sum()
    places = rng.random(length)

    def body(n: int) -> str:
        # The dots take what rounding leaves. Ranks 2 to 4 stay apart from 60 words on.
        counts = np.floor(shares * n + 0.5).astype(int)
        counts[0] = n - counts[1:].sum()
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        order = np.argsort(places[: len(listed)], kind="stable")
        return " ".join(listed[int(at)] for at in order)

    question = Question(
        f"\nNot counting the dots {DOTS}, which three coded words stand most often in the text above?",
        "The three coded words that stand most often are",
        tuple(words[1:4]),
    )
    intro = "Find the three most frequent words of this coded text."
    return Draft(intro, body, (question,), least=60)
