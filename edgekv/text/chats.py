"""Questions that start a chat, in the model's own template, for text that the model writes itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator

import numpy as np

CHATS = 512
ASKS = (
    "What is {}?",
    "Explain {} to a child.",
    "Why does {} matter?",
    "Write a short story about {}.",
    "Give me five tips about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write a poem about {}.",
    "Tell me the history of {}.",
    "How do I get started with {}?",
    "Summarize what a beginner should know about {}.",
    "What are common mistakes in {}, and how do I avoid them?",
    "Write an email to a friend about {}.",
    "Compare {} with {}.",
    "Make a table with facts on {}.",
    "Write a dialogue in which two people argue about {}.",
    "I know nothing about {}. Where should I begin?",
)
TOPICS = (
    *("the water cycle", "photosynthesis", "gravity", "the speed of light", "earthquakes", "vaccines"),
    *("the Roman Empire", "the French Revolution", "the Silk Road", "the space race", "Ancient Egypt"),
    *("Python functions", "sorting a list in Python", "SQL joins", "recursion", "unit tests", "Linux"),
    *("percentages", "prime numbers", "solving linear equations", "probability", "the Pythagorean theorem"),
    *("cooking rice", "baking bread", "a healthy breakfast", "growing tomatoes", "coffee", "composting"),
    *("saving money", "a job interview", "remote work", "learning a language", "time management"),
    *("running", "chess", "football", "swimming", "yoga", "board games"),
    *("Japan", "Brazil", "the Sahara", "the Pacific Ocean", "Paris", "Antarctica"),
    *("Shakespeare", "jazz", "impressionist painting", "photography", "science fiction", "the violin"),
    *("friendship", "honesty", "fear of public speaking", "sleep", "stress", "habits"),
    *("electric cars", "solar panels", "the internet", "robots", "artificial intelligence", "batteries"),
    *("dogs", "whales", "bees", "dinosaurs", "rain forests", "the Moon"),
)


def questions(seed: int) -> Iterator[str]:
    """Questions without end, each drawn anew."""
    rng = np.random.default_rng(seed)
    while True:
        ask = str(rng.choice(ASKS))
        yield ask.format(*rng.choice(TOPICS, ask.count("{}"), replace=False))


class Chat:
    """Endless sequence of opened chats as tokens, the same for the same seed.

    Args:
        opened: turns a question into the tokens of a chat that waits for the answer.
        ends: tokens that end an answer.
    """

    def __init__(self, opened: Callable[[str], list[int]], ends: Collection[int], seed: int) -> None:
        self.ends = frozenset(ends)
        self._chats = [opened(question) for question in itertools.islice(questions(seed), CHATS)]
        self._turn = 0

    def next(self) -> list[int]:
        """The next chat, up to where the answer begins."""
        self._turn += 1
        return self._chats[self._turn % CHATS]
