"""The cost of answering a question where the cache is (route), with its rows brought here (fetch), or from nothing.

"Move the query, not the cache" (arXiv 2606.01502): each way costs probe + transfer + compute + return + merge. Here a
question is a whole prompt, so what returns is text and a merge is rows that are put into an engine; to these come the
wait for an engine that is busy, and the tokens of the answer after the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Way = Literal["local", "fetch", "route"]
SHORT = 64  # tokens: about a question behind what is cached
Terms = tuple[float, float, float]


@dataclass(frozen=True)
class Link:
    """A connection: `round_trip_s` of the smallest request, then `bytes_per_s`."""

    round_trip_s: float
    bytes_per_s: float

    def transfer_s(self, nbytes: float) -> float:
        """Seconds that bytes take one way, once the connection is open."""
        return nbytes / self.bytes_per_s


@dataclass(frozen=True)
class Prefill:
    """Seconds of a prefill: per run, per token, and per pair of a token and a row that it attends to."""

    run_s: float
    token_s: float
    pair_s: float

    def seconds(self, count: int, depth: int) -> float:
        """Of `count` tokens behind `depth` ones that are cached; 0 for none."""
        run, tokens, pairs = self.terms(count, depth)
        return run * self.run_s + tokens * self.token_s + pairs * self.pair_s if count else 0.0

    @staticmethod
    def terms(count: int, depth: int) -> Terms:
        """What the three coefficients are multiplied with (edgekv.route.fit)."""
        return 1.0, count, count * (depth + count / 2)


@dataclass(frozen=True)
class Site:
    """One engine as it is now.

    Attributes:
        decode_s: of a token of an answer.
        wait_s: until it begins with a new prompt.
        save_s, load_s: per byte of rows that it gives away, or checks and takes.
        short: a prefill of at most SHORT tokens, where engines take other ways through their attention; else as any.
    """

    prefill: Prefill
    decode_s: float
    wait_s: float = 0.0
    save_s: float = 0.0
    load_s: float = 0.0
    short: Prefill | None = None

    def compute_s(self, count: int, held: int) -> float:
        """Until the first token of a prompt of `count` tokens, of which `held` are cached; the last is always run."""
        depth = min(held, count - 1)
        prefill = self.short if self.short and count - depth <= SHORT else self.prefill
        return prefill.seconds(count - depth, depth)


@dataclass(frozen=True)
class Question:
    """A prompt to be answered.

    Attributes:
        n_tokens: of the prompt; `n_answer`: expected of the answer.
        text_nbytes: what a request with it weighs.
        row_nbytes: of one cached token.
        encode_s: what an engine needs to turn it into tokens.
    """

    n_tokens: int
    n_answer: int
    text_nbytes: int
    row_nbytes: int
    encode_s: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of one way, by what they go to; `answer_s` is that of the tokens after the first."""

    wait_s: float = 0.0
    probe_s: float = 0.0
    transfer_s: float = 0.0
    compute_s: float = 0.0
    merge_s: float = 0.0
    return_s: float = 0.0
    answer_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        """Until the first token."""
        return self.total_s - self.answer_s

    @property
    def total_s(self) -> float:
        """Until the last token."""
        parts = (self.wait_s, self.probe_s, self.transfer_s, self.compute_s, self.merge_s, self.return_s)
        return sum(parts) + self.answer_s


def local_cost(question: Question, here: Site, held: int) -> Cost:
    """Of prefilling here what is not among the `held` tokens."""
    return Cost(
        wait_s=here.wait_s,
        compute_s=question.encode_s + here.compute_s(question.n_tokens, held),
        answer_s=question.n_answer * here.decode_s,
    )


def route_cost(question: Question, link: Link, there: Site, held: int) -> Cost:
    """Of sending the question to an engine that holds `held` of its tokens; the answer's text weighs nothing."""
    return Cost(
        wait_s=there.wait_s,
        probe_s=link.round_trip_s,
        transfer_s=link.transfer_s(question.text_nbytes),
        compute_s=question.encode_s + there.compute_s(question.n_tokens, held),
        answer_s=question.n_answer * there.decode_s,
    )


def fetch_cost(question: Question, link: Link, there: Site, here: Site, held: int) -> Cost:
    """Of bringing the rows of `held` tokens here, and prefilling the rest."""
    nbytes = held * question.row_nbytes
    return Cost(
        wait_s=here.wait_s,
        probe_s=link.round_trip_s,
        transfer_s=link.transfer_s(nbytes),
        compute_s=question.encode_s + here.compute_s(question.n_tokens, held),
        merge_s=nbytes * (there.save_s + here.load_s),
        answer_s=question.n_answer * here.decode_s,
    )


def cheapest(costs: Mapping[Way, Cost]) -> Way:
    """The way whose answer is complete first; of equal ones the first."""
    return min(costs, key=lambda way: costs[way].total_s)
