"""Perplexity by position against full logits; retrieval against engines whose memory is known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.open import open_backend
from edgekv.errors import InputError
from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.positions import bucket_edges, measure_positions, positions_result
from edgekv.evaluate.retrieval import (
    DEPTHS,
    Haystack,
    ask,
    make_haystack,
    measure_retrieval,
    retrieval_result,
)
from edgekv.evaluate.workers import Run
from edgekv.reference.ops import log_softmax
from edgekv.source import Array
from edgekv.text.scored import cut_windows
from edgekv.tokenizer.tokenizer import Tokenizer

CONTEXT = 1408


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 letters in words; no digits, so that a planted number is the only one."""
    rng = np.random.default_rng(11)
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(rng.choice(list("aeinorst .\n"), 5000)))
    return path


def run(folder: Path) -> Run:
    return Run(folder, lambda *_: None, 1, 1)


def test_edges() -> None:
    assert bucket_edges(8192) == [0, 256, 512, 1024, 2048, 4096, 8191]
    assert bucket_edges(300) == [0, 256, 299]
    assert bucket_edges(257) == [0, 256]
    assert bucket_edges(4) == [0, 3]


def test_perplexity_by_position_is_that_of_full_logits(
    tiny_llama: Path, tiny_mla: Path, book: Path, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    text = cut_windows(book, tokenizer, 512, 3)
    losses = measure_positions(text, ModelUnderTest(tiny_mla, cache_type="f32"), run(tmp_path))
    base = measure_positions(text, ModelUnderTest(tiny_llama, "reference"), run(tmp_path))
    result = positions_result(text, losses, base)

    backend = open_backend(tiny_llama, "reference", n_ctx=512)
    tokens = np.array(tokenizer.encode(book.read_text()))[: 3 * 512].reshape(3, 512)
    nll = []
    for row in tokens:
        backend.trim(0)
        log_p = log_softmax(backend.prefill_all([int(t) for t in row[:-1]]))
        nll.append(-log_p[np.arange(511), row[1:]])
    expected = np.array(nll, np.float64)
    assert [(b.start, b.stop, b.tokens_scored) for b in result.buckets] == [(0, 256, 768), (256, 511, 765)]
    for bucket in result.buckets:
        here = expected[:, bucket.start : bucket.stop]
        assert bucket.reference_ppl == pytest.approx(np.exp(here.mean()), rel=1e-4)
        assert bucket.ppl_ratio == pytest.approx(bucket.ppl / bucket.reference_ppl, rel=1e-6)
    ratios = (losses - base)[:, 0] / 256
    assert result.buckets[0].ppl_ratio_se == pytest.approx(
        np.exp(ratios.mean()) * ratios.std(ddof=1) / 3**0.5, rel=1e-6
    )


class Copier:
    """An engine that writes what once followed its last four tokens, as far as it remembers: `memory` tokens."""

    name = "copier"

    def __init__(self, n_vocab: int, memory: int, n_ctx: int = CONTEXT) -> None:
        self.n_vocab, self.n_ctx, self._memory = n_vocab, n_ctx, memory
        self._tokens: list[int] = []
        self._next: dict[
            tuple[int, ...], int
        ] = {}  # where the last tokens stood before: position behind them
        self.ran = 0

    @property
    def n_past(self) -> int:
        return len(self._tokens)

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self.prefill_all(tokens)[-1]

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        return np.array([self.decode(token) for token in tokens], np.float32)

    def decode(self, token: int) -> Array:
        assert self.n_past < self.n_ctx
        self.ran += 1
        self._tokens.append(token)
        logits = np.zeros(self.n_vocab, np.float32)
        key = tuple(self._tokens[-4:])
        seen = self._next.get(key, 0)
        if seen and self.n_past - seen < self._memory:
            logits[self._tokens[seen]] = 20
        self._next[key] = self.n_past
        return logits

    def trim(self, n_past: int) -> None:
        assert n_past <= self.n_past
        kept, self._tokens, self._next = self._tokens[:n_past], [], {}
        for token in kept:
            self._tokens.append(token)
            self._next[tuple(self._tokens[-4:])] = self.n_past

    def cache_nbytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def haystack(tokenizer: Tokenizer, book: Path, trials: int = 2) -> Haystack:
    return make_haystack(book, tokenizer, CONTEXT, trials)


def test_an_engine_that_remembers_all_finds_all(tiny_llama: Path, book: Path) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    hay = haystack(tokenizer, book)
    answers = [ask(Copier(len(tokenizer), CONTEXT), prompt) for prompt in hay.prompts]
    result = retrieval_result(hay, answers, answers)
    assert [cell.length for cell in result.cells[::5]] == [176, 352, 704, 1408]
    assert [cell.depth for cell in result.cells[:5]] == list(DEPTHS)
    assert all(cell.found == cell.reference_found == 1 for cell in result.cells)
    assert all(cell.number_ppl < 1.1 for cell in result.cells)


def test_an_engine_that_forgets_finds_what_is_near(tiny_llama: Path, book: Path) -> None:
    """Of 290 tokens that it remembers it finds the line in short prompts, and at the end of long ones."""
    tokenizer = read_tokenizer(tiny_llama)
    hay = haystack(tokenizer, book)
    result = retrieval_result(hay, [ask(Copier(len(tokenizer), 290), prompt) for prompt in hay.prompts], None)
    found = {(cell.length, cell.depth): cell.found for cell in result.cells}
    assert {key for key, share in found.items() if share == 0} == {
        (352, 0.0),
        *((704, depth) for depth in DEPTHS[:3]),
        *((1408, depth) for depth in DEPTHS[:4]),
    }
    assert {share for share in found.values()} == {0, 1}
    assert all(cell.reference_found is None for cell in result.cells)


def test_prompts_are_as_long_as_they_say_and_hold_the_line_once(tiny_llama: Path, book: Path) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    for prompt in haystack(tokenizer, book).prompts:
        cut = round(0.5 * len(prompt.prose))
        whole = [*prompt.prose[:cut], *prompt.line, *prompt.prose[cut:], *prompt.question.ids]
        assert len(whole) == prompt.length
        text = tokenizer.decode(whole)
        question = tokenizer.decode(prompt.question.ids[: prompt.question.first])
        assert text.count(question) == 2
        number = tokenizer.decode(prompt.question.ids[prompt.question.first :])
        assert len(number.strip()) == 5
        assert text.endswith(question + number)


def test_prose_before_the_line_is_run_once(tiny_llama: Path, book: Path) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    prompt = haystack(tokenizer, book).prompts[3]
    copier = Copier(len(tokenizer), CONTEXT)
    ask(copier, prompt)
    assert copier.ran < 3.5 * CONTEXT + 5 * (len(prompt.line) + len(prompt.question.ids))


def test_more_trials_go_on_from_fewer(
    tiny_llama: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    one, three = haystack(tokenizer, book, 1), haystack(tokenizer, book, 3)
    assert three.prompts[:4] == one.prompts
    assert len({tuple(prompt.prose) for prompt in three.prompts}) == 12
    subject = ModelUnderTest(tiny_llama, "reference")
    first = measure_retrieval(replace(one, prompts=one.prompts[:1]), subject, run(tmp_path))
    monkeypatch.setattr("edgekv.evaluate.workers.open_engine", None)
    again = measure_retrieval(replace(three, prompts=three.prompts[:1]), subject, run(tmp_path))
    assert [tuple(a) for a in again[0]] == [tuple(a) for a in first[0]]


@pytest.mark.parametrize(("model", "prompts"), [("tiny_llama", slice(2)), ("tiny_gemma", slice(3, 4))])
def test_engines_agree_on_retrieval(
    request: pytest.FixtureRequest, model: str, prompts: slice, book: Path, tmp_path: Path
) -> None:
    """Trimming and going on must leave llama.cpp where a fresh reference is; a window cannot go back so far."""
    path: Path = request.getfixturevalue(model)
    tokenizer = read_tokenizer(path)
    hay = replace(haystack(tokenizer, book, 1), prompts=haystack(tokenizer, book, 1).prompts[prompts])
    fast = measure_retrieval(hay, ModelUnderTest(path, cache_type="f32"), run(tmp_path))
    slow = measure_retrieval(hay, ModelUnderTest(path, "reference"), run(tmp_path))
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_allclose([log_p for log_p, _ in a], [log_p for log_p, _ in b], rtol=2e-3)


def test_texts_and_contexts_that_do_not_do(tiny_llama: Path, book: Path) -> None:
    tokenizer = read_tokenizer(tiny_llama)
    with pytest.raises(InputError, match="shorten --ctx-size, or give more text"):
        make_haystack(book, tokenizer, 8192, 1)
    with pytest.raises(InputError, match=r"shortest prompt has 64 tokens.* a --ctx-size of 1\d+ or more"):
        make_haystack(book, tokenizer, 512, 1)
    with pytest.raises(InputError, match="shorten --ctx-size"):
        cut_windows(book, tokenizer, 8192, 1, "--ctx-size")
