"""How fast this engine is, as it was measured: prompts, answers, and rows that go out and come in."""

from __future__ import annotations

import time
from collections.abc import Sequence

from edgekv.backends.sequences import Piece, Sequences
from edgekv.documents import Document
from edgekv.route.cost import SHORT, Prefill
from edgekv.route.fit import Measurements

FIRST_TPS = 256.0  # tokens/s that are assumed before any were measured
FIRST_DECODE_S, FIRST_BYTE_S = 0.05, 1e-8
MEASURE_S, SLICE, N_DECODED = 3.0, 256, 4  # of a measurement at the start: its time, and tokens
MIN_SLICE = 16  # tokens of the smallest slice


class RatesNow(Document, frozen=True):
    """Coefficients of edgekv.route.cost.Prefill, and of short ones; seconds per token of an answer and byte of rows."""

    prefill: tuple[float, float, float]
    short: tuple[float, float, float]
    decode_s: float
    save_s: float
    load_s: float


class Rates:
    """Measurements of one engine."""

    def __init__(self) -> None:
        # Slices of long prompts are cut to take about the same time, which seconds per run would explain alone.
        self._long = Measurements((1 / FIRST_TPS, 0.0))
        self._short = Measurements((0.0, 1 / FIRST_TPS, 0.0))
        self._decode = Measurements((FIRST_DECODE_S,))
        self._save, self._load = Measurements((FIRST_BYTE_S,)), Measurements((FIRST_BYTE_S,))

    @property
    def prefill(self) -> Prefill:
        """Seconds of a prefill."""
        return Prefill(0.0, *self._long.coefficients)

    def now(self) -> RatesNow:
        """All of them."""
        decode, save, load = (each.coefficients[0] for each in (self._decode, self._save, self._load))
        token_s, pair_s = self._long.coefficients
        short_run_s, short_token_s, short_pair_s = self._short.coefficients
        short = short_run_s, short_token_s, short_pair_s
        return RatesNow((0.0, token_s, pair_s), short, decode, save, load)

    def ran(self, pieces: Sequence[Piece], seconds: float) -> None:
        """Note a batch; one that mixes prompts and answers tells of neither."""
        if len(pieces) == 1 and (count := len(pieces[0].tokens)) > 1:
            run, tokens, pairs = Prefill.terms(count, pieces[0].start)
            if count <= SHORT:
                self._short.add((run, tokens, pairs), seconds)
            else:
                self._long.add((tokens, pairs), seconds)
        elif all(len(piece.tokens) == 1 for piece in pieces):
            self._decode.add((1.0,), seconds)

    def saved(self, nbytes: int, seconds: float) -> None:
        """Note rows that were copied out of the engine and written to a file."""
        self._save.add((nbytes,), seconds)

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Note rows that were read from a file, checked and put into the engine."""
        self._load.add((nbytes,), seconds)


def measure(engine: Sequences, rates: Rates) -> list[int]:
    """Run some tokens in an empty engine's sequence 0, for MEASURE_S seconds or half a context; those that are cached.

    The depth grows from slice to slice, so that what attention adds to a token's time is seen too.
    """
    tokens: list[int] = []

    def run(count: int) -> float:
        new = [(len(tokens) + i) % engine.n_vocab for i in range(count)]
        piece = Piece(0, len(tokens), new, logits=True)
        began = time.perf_counter()
        engine.run([piece])
        seconds = time.perf_counter() - began
        if tokens:  # what the first run sets up is no part of any speed
            rates.ran([piece], seconds)
        tokens.extend(new)
        return seconds

    run(1)
    started = time.perf_counter()
    about_a_second = int(MIN_SLICE / run(MIN_SLICE))
    size = min(SLICE, engine.n_batch, max(2 * SHORT, about_a_second))
    most = engine.n_ctx // 2 - size - MIN_SLICE - SHORT
    while time.perf_counter() - started < MEASURE_S and len(tokens) < most:
        run(size)
        run(MIN_SLICE)
        run(SHORT)
    for _ in range(N_DECODED):
        run(1)
    return tokens
